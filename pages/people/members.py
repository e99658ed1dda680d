"""The page of a farm's people: who belongs to it with which role, an invitation for a colleague, and those that are open."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django import forms
from django.contrib import messages
from django.core.exceptions import ValidationError
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy
from django.views.decorators.http import require_http_methods, require_POST

from devices.models import Invitation, Membership, Organization, Role
from devices.people.links import page_of
from devices.permissions import access_of
from pages import organizations
from pages.areas import AreaChoice
from pages.place import demand, page, row_of

ISSUED = "issued_invitation"


class RoleForm(forms.Form):
    """A role in words, and the area that it is limited to."""

    role = forms.ChoiceField(choices=lambda: [(role, _(str(role.label))) for role in Role], label=lazy("Role"))

    def __init__(self, organization: Organization, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        area = AreaChoice(organization, none=_("the whole farm"), label=_("Only in"))
        if area.has_areas:
            self.fields["area"] = area

    def fill(self, row: Membership | Invitation) -> bool:
        """Whether the row may be so; the form says why not."""
        row.role, row.area = self.cleaned_data["role"], self.cleaned_data.get("area")
        try:
            row.clean()
        except ValidationError as error:
            for field, texts in error.message_dict.items():
                self.add_error(field if field in self.fields else None, texts)
        return not self.errors


class InviteForm(RoleForm):
    note = forms.CharField(
        max_length=200, required=False, label=lazy("For whom"), help_text=lazy("for your own memory")
    )


@page
@require_http_methods(["GET", "HEAD", "POST"])
def people_page(request: HttpRequest) -> HttpResponse:
    organization = organizations.demanded(request, "view", "memberships")
    access = access_of(request)
    form = InviteForm(organization, request.POST or None, initial={"role": Role.OPERATOR})
    if request.method == "POST":
        demand(request, "add", "invitations", organization.pk)
        row = Invitation(organization=organization)
        if form.is_valid() and form.fill(row):
            fields = {
                "organization": organization,
                "role": row.role,
                "area": row.area,
                "note": form.cleaned_data["note"],
            }
            _issued, token = Invitation.objects.issue(**fields, created_by=request.user.get_username())
            request.session[ISSUED] = token
            return redirect(_address(organization))
    token = request.session.pop(ISSUED, None)  # shown on the next page, once
    may_change = access.may("change", "memberships", organization.pk)
    members = (
        Membership.objects.filter(organization=organization).select_related("user", "area").order_by("user__username")
    )
    invitations = Invitation.objects.none()
    if access.may("view", "invitations", organization.pk):
        invitations = Invitation.objects.filter(
            organization=organization, accepted_at=None, expires_at__gt=timezone.now()
        ).select_related("area")
    context = {
        "organization": organization,
        "members": [(row, _form_of(row) if may_change else None) for row in members],
        "invitations": invitations,
        "form": form if access.may("add", "invitations", organization.pk) else None,
        "link": page_of(request, token) if token else "",
        "page": "people",
    }
    return render(request, "pages/people.html", context, status=400 if form.errors else 200)


@page
@require_POST
def change_member(request: HttpRequest, uuid: UUID, user: int) -> HttpResponse:
    row = _member(request, uuid, user, "change")
    form = _form_of(row, request.POST)
    if form.is_valid() and form.fill(row):
        row.save()
        messages.success(request, _("{person} is changed.").format(person=row.user))
    else:
        why = " ".join(str(text) for texts in form.errors.values() for text in texts)
        messages.error(request, _("{person} stays as before: {why}").format(person=row.user, why=why))
    return redirect(_address(row.organization))


@page
@require_POST
def remove_member(request: HttpRequest, uuid: UUID, user: int) -> HttpResponse:
    row = _member(request, uuid, user, "delete")
    if row.is_last_admin:
        text = _("{person} stays: a farm needs an admin. Make somebody else one first.")
        messages.error(request, text.format(person=row.user))
    else:
        row.delete()
        messages.success(request, _("{person} does not belong to the farm any more.").format(person=row.user))
    return redirect(_address(row.organization) if row.user != request.user else "home")


@page
@require_POST
def withdraw(request: HttpRequest, uuid: UUID) -> HttpResponse:
    row = row_of(request, Invitation.objects.select_related("organization"), "invitations", uuid)
    demand(request, "delete", "invitations", row.organization_id)
    row.delete()
    messages.success(request, _("The invitation is withdrawn: its link lets nobody in any more."))
    return redirect(_address(row.organization))


def _form_of(row: Membership, data: Any = None) -> RoleForm:
    initial = {"role": row.role, "area": str(row.area.uuid) if row.area else ""}
    return RoleForm(row.organization, data, initial=initial, auto_id=f"id_{row.user_id}_%s")


def _member(request: HttpRequest, uuid: UUID, user: int, verb: Any) -> Membership:
    organization = row_of(request, Organization.objects.all(), "organizations", uuid, path="pk")
    demand(request, verb, "memberships", organization.pk)
    rows = Membership.objects.filter(organization=organization, user=user)
    if (found := rows.select_related("user", "organization", "area").first()) is None:
        raise Http404("There is no such member.")
    return found


def _address(organization: Organization) -> str:
    return f"{reverse('people-page')}?organization={organization.uuid}"
