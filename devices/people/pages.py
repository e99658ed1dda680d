"""The page behind the link of an invitation: join with the account that is logged in, or with a new one."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.auth import login
from django.contrib.auth.decorators import login_required
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from devices.models import Invitation, Role
from devices.people import failures, second_factor
from devices.people.joining import join
from devices.people.login import tried
from devices.people.models import CannotJoin


class AccountForm(forms.Form):
    username = forms.CharField(max_length=150, label=lazy("User name"))
    password = forms.CharField(
        widget=forms.PasswordInput(attrs={"autocomplete": "new-password"}),
        label=lazy("Password"),
        help_text=lazy("At least ten characters."),
    )


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def join_page(request: HttpRequest, token: str) -> HttpResponse:
    attempt = {failures.ADDRESS: failures.address_of(request.META)}
    if closed := failures.seconds_closed(attempt):
        return _page(request, {"problem": _too_many(closed)}, status=429)
    try:
        invitation = Invitation.objects.of(token)
        form = AccountForm(request.POST or None)
        if request.method == "POST" and (request.user.is_authenticated or form.is_valid()):
            return _joined(request, form, token)
    except CannotJoin as error:
        failures.count(attempt)
        return _page(request, {"problem": str(error)}, status=410)
    except ValidationError as error:
        for field, texts in error.message_dict.items():
            for text in texts:
                form.add_error(field if field in form.fields else None, text)
    return _page(request, {"invitation": invitation, "role": Role(invitation.role).label, "form": form})


@never_cache
@login_required(login_url="admin:login")
@require_http_methods(["GET", "HEAD", "POST"])
def second_factor_page(request: HttpRequest) -> HttpResponse:
    """Switch one's own second factor on or off."""
    attempt = tried(request, request.user.get_username())
    context: dict[str, Any] = {"title": _("Second factor")}
    if request.method == "POST":
        code = request.POST.get("code", "")
        if closed := failures.seconds_closed(attempt):
            context["problem"] = _too_many(closed)
        elif second_factor.is_on(request.user):
            if second_factor.accepts(request.user, code):
                second_factor.remove(request.user)
                return redirect("second-factor")
        elif codes := second_factor.confirm(request.user, code):
            context["codes"] = codes
        if not (context.get("codes") or context.get("problem")):
            failures.count(attempt)
            context["problem"] = _("This is not the code of now. Is the clock of your phone right?")
    context["is_on"] = second_factor.is_on(request.user)
    if not context["is_on"]:
        device = second_factor.proposed(request.user)
        context |= {"picture": second_factor.picture(device), "text": second_factor.as_text(device)}
    return render(request, "devices/second_factor.html", {**admin.site.each_context(request), **context})


def _too_many(seconds: int) -> str:
    return _("Too many attempts; try again in {seconds} seconds.").format(seconds=seconds)


def _joined(request: HttpRequest, form: AccountForm, token: str) -> HttpResponse:
    given = {} if request.user.is_authenticated else form.cleaned_data
    membership = join(request.user, token=token, **given)
    if not request.user.is_authenticated:
        login(request, membership.user, backend="django.contrib.auth.backends.ModelBackend")
    return redirect("home")


def _page(request: HttpRequest, context: dict[str, Any], *, status: int = 200) -> HttpResponse:
    whole = {**admin.site.each_context(request), "title": _("Join a farm"), "is_nav_sidebar_enabled": False, **context}
    return render(request, "devices/join.html", whole, status=status)
