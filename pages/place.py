"""What every page needs: a person who is logged in, and the right for what is asked."""

from __future__ import annotations

from typing import Any, TypeVar
from uuid import UUID

from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied
from django.db.models import Model, QuerySet
from django.http import Http404, HttpRequest
from django.views.decorators.cache import never_cache

from devices.permissions import Verb, access_of

Row = TypeVar("Row", bound=Model)


def page(view: Any) -> Any:
    """A view for people who are logged in, never out of a cache."""
    return never_cache(login_required(login_url="admin:login")(view))


def row_of(
    request: HttpRequest, rows: QuerySet[Row], resource: str, uuid: UUID | str, *, path: str = "organization"
) -> Row:
    """The one with this uuid, in an organization whose rows the person may see; `path` leads there. Raises Http404."""
    found = access_of(request).limit(rows, path, resource=resource).filter(uuid=uuid).first()
    if found is None:
        raise Http404(f"There is no such {rows.model._meta.verbose_name}.")
    return found


def demand(request: HttpRequest, verb: Verb, resource: str, organization_id: int) -> None:
    """Raises PermissionDenied, of Django. The audit log names the organization."""
    access = access_of(request)
    access.demanded.add(organization_id)
    if not access.may(verb, resource, organization_id):
        raise PermissionDenied(f"Your role does not let you {verb} {resource.replace('-', ' ')} here.")
