"""Which organization a page is about: the one that its address names, else the first that the person belongs to."""

from __future__ import annotations

from django.http import Http404, HttpRequest

from devices.models import Organization
from devices.permissions import Access, Verb, access_of
from pages.place import demand


def known_to(access: Access) -> list[Organization]:
    return list(access.limit(Organization.objects.all(), "pk", resource="organizations"))


def demanded(request: HttpRequest, verb: Verb, resource: str) -> Organization:
    """The one that the page is about, in which the person has the right. Raises Http404 and PermissionDenied."""
    organization = chosen(request, known_to(access_of(request)))
    if organization is None:
        raise Http404("You belong to no organization.")
    demand(request, verb, resource, organization.pk)
    return organization


def chosen(request: HttpRequest, known: list[Organization]) -> Organization | None:
    """None for who belongs to none. Raises Http404."""
    wanted = request.GET.get("organization", "")
    found = [each for each in known if str(each.uuid) == wanted]
    if wanted and not found:
        raise Http404("There is no such organization.")
    return next(iter(found or known), None)
