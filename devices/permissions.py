"""Which organizations and rows a person may view, add, change and delete.

RIGHTS is the one table of it. The REST API and the admin both ask it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest
from rest_framework.exceptions import PermissionDenied
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request

from devices.areas.models import within
from devices.models import ApiToken, Membership, Organization, Role

if TYPE_CHECKING:
    from rest_framework.views import APIView

Verb = Literal["view", "add", "change", "delete"]
Row = TypeVar("Row", bound=Model)

_RANK: Mapping[str, int] = {Role.VIEWER: 1, Role.OPERATOR: 2, Role.ADMIN: 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """The least role that each verb needs in the row's organization; None leaves it to superusers.

    `placed`: rows stand in areas, so that whoever is limited to an area acts on those in it.
    """

    view: Role | None = Role.VIEWER
    add: Role | None = None
    change: Role | None = None
    delete: Role | None = None
    placed: bool = False


_OF_OPERATORS = Rights(add=Role.OPERATOR, change=Role.OPERATOR, delete=Role.OPERATOR)
_OF_ADMINS = Rights(add=Role.ADMIN, change=Role.ADMIN, delete=Role.ADMIN)

RIGHTS: Mapping[str, Rights] = {
    "organizations": Rights(change=Role.ADMIN),
    # Nobody is made a member unasked: admins invite.
    "memberships": Rights(change=Role.ADMIN, delete=Role.ADMIN),
    "invitations": Rights(view=Role.ADMIN, add=Role.ADMIN, delete=Role.ADMIN),
    "areas": _OF_ADMINS,
    "sensors": _OF_ADMINS,
    "variables": _OF_ADMINS,
    "devices": _OF_ADMINS,
    "device-states": replace(_OF_OPERATORS, placed=True),
    # Who may change an interlock may also override it.
    "interlocks": _OF_ADMINS,
    "vetoes": Rights(),
    "device-tokens": _OF_ADMINS,
    "readings": Rights(),
    "data-problems": Rights(delete=Role.OPERATOR),
    "state-changes": Rights(add=Role.OPERATOR, placed=True),
    "rule-chains": _OF_OPERATORS,
    "alarms": Rights(change=Role.OPERATOR, placed=True),
    "notifications": Rights(add=Role.OPERATOR, change=Role.OPERATOR),
    "rejected-events": Rights(change=Role.OPERATOR),
    "dead-letters": Rights(change=Role.OPERATOR),
    "replays": Rights(change=Role.OPERATOR),
    "audit-log": Rights(view=Role.ADMIN),
}


@dataclass(frozen=True, slots=True)
class Access:
    """What one person may do. `roles`: organization id -> role; a superuser needs none. `areas`: organization id -> ids of the
    areas that the person is limited to there; no entry is no limit. `demanded`: where a right was needed.
    """

    superuser: bool
    roles: Mapping[int, str]
    areas: Mapping[int, frozenset[int]] = field(default_factory=dict)
    demanded: set[int | None] = field(default_factory=set, compare=False)

    def may(self, verb: Verb, resource: str, organization_id: int | None, *, area: int | None = None) -> bool:
        """`area`: where the row stands. All rows may be looked at; one that stands nowhere is changed by who has no limit."""
        if self.superuser:
            return True
        if organization_id is None or not self._has_role(verb, resource, organization_id):
            return False
        return verb == "view" or organization_id not in self.areas or area in self.areas[organization_id]

    def _has_role(self, verb: Verb, resource: str, organization_id: int) -> bool:
        needed: Role | None = getattr(RIGHTS[resource], verb)
        role = self.roles.get(organization_id)
        return needed is not None and role is not None and _RANK[role] >= _RANK[needed]

    def organizations(self, verb: Verb, resource: str) -> list[int]:
        """The ids of the organizations in which the verb is allowed wherever a row stands; means nothing for a superuser."""
        return [organization_id for organization_id in self.roles if self.may(verb, resource, organization_id)]

    def limited_to(self, verb: Verb, resource: str) -> list[int]:
        """The ids of the areas in which the verb is allowed to a person who is limited to them."""
        limited = (areas for each, areas in self.areas.items() if self._has_role(verb, resource, each))
        return [area for areas in limited for area in areas]

    def may_somewhere(self, verb: Verb, resource: str) -> bool:
        if self.superuser or self.organizations(verb, resource):
            return True
        return RIGHTS[resource].placed and bool(self.limited_to(verb, resource))

    def limit(
        self, rows: QuerySet[Row], path: str, *, resource: str, verb: Verb = "view", area_path: str = ""
    ) -> QuerySet[Row]:
        """The rows with which the verb is allowed; `path` leads from a row to its organization, `area_path` to its area."""
        if self.superuser:
            return rows
        allowed = Q(**{f"{path}__in": self.organizations(verb, resource)})
        if area_path and verb != "view":
            allowed |= Q(**{f"{area_path}__in": self.limited_to(verb, resource)})
        return rows.filter(allowed)

    def demand(self, verb: Verb, resource: str, organization_id: int | None, *, area: int | None = None) -> None:
        """Raises PermissionDenied with the roles held and needed; only for an organization the person may see."""
        self.demanded.add(organization_id)
        if self.may(verb, resource, organization_id, area=area):
            return
        if (
            organization_id is not None
            and organization_id in self.areas
            and self._has_role(verb, resource, organization_id)
        ):
            raise PermissionDenied(
                f"You are limited to an area: to {verb} {resource} elsewhere takes somebody who is not."
            )
        held = self.roles.get(organization_id) if organization_id is not None else None
        raise PermissionDenied(_refusal(verb, resource, held))


def _refusal(verb: Verb, resource: str, held: str | None) -> str:
    needed: Role | None = getattr(RIGHTS[resource], verb)
    who = f"the role {needed.value}" if needed else "a superuser"
    yours = f"; yours in this organization is {held}" if held else ""
    return f"To {verb} {resource} takes {who}{yours}."


def access_of(request: Request | HttpRequest) -> Access:
    """The access of the person who asks, looked up once per request."""
    known = getattr(request, "aemos_access", None)
    if isinstance(known, Access):
        return known
    user = request.user
    token = getattr(request, "auth", None)
    superuser = bool(user.is_active and user.is_superuser)
    if isinstance(token, ApiToken):
        roles, areas = (_all_roles(), {}) if superuser else _roles_of(token.user_id)
        access = Access(False, _capped(roles, token.role), areas)
    elif superuser or not user.is_authenticated:
        access = Access(superuser, {})
    else:
        access = Access(False, *_roles_of(user.pk))
    request.aemos_access = access  # type: ignore[union-attr]
    plain: Any = getattr(request, "_request", request)  # what middleware sees of it
    plain.aemos_organizations, plain.aemos_token = access.demanded, token
    return access


def _roles_of(user_id: int) -> tuple[dict[int, str], dict[int, frozenset[int]]]:
    """Roles and areas, by organization; one query for who is limited nowhere."""
    rows = list(Membership.objects.filter(user_id=user_id).select_related("area"))
    areas = {row.organization_id: frozenset(within(row.area)) for row in rows if row.area is not None}
    return {row.organization_id: row.role for row in rows}, areas


def _all_roles() -> dict[int, str]:
    return dict.fromkeys(Organization.objects.values_list("pk", flat=True), Role.ADMIN)


def _capped(roles: Mapping[int, str], most: str) -> dict[int, str]:
    return {organization: min(role, most, key=_RANK.__getitem__) for organization, role in roles.items()}


def id_at(row: Model, path: str) -> int | None:
    """The id of the organization or area to which `path` leads from a row; None where it leads to none."""
    found = row if path == "pk" else attrgetter(path.replace("__", "."))(row)
    key: int | None = found.pk if found is not None else None
    return key


class MemberPermission(BasePermission):
    """Lets in people who are logged in; a view that names a `resource` is also checked against RIGHTS.

    Rows are looked up among the visible ones first, so that a foreign row is a 404 whatever one may do.
    """

    def has_permission(self, request: Request, view: APIView) -> bool:
        if not (request.user and request.user.is_authenticated):
            return False
        resource, verb = getattr(view, "resource", None), verb_of(request, view)
        if resource is not None and request.method != "OPTIONS":
            access = access_of(request)
            if verb == "add" and not access.may_somewhere("add", resource):
                raise PermissionDenied(_refusal("add", resource, None))
            # Who belongs nowhere sees an empty list of what every member may see.
            if access.roles and not access.may_somewhere("view", resource):
                raise PermissionDenied(_refusal(verb, resource, None))
        return True

    def has_object_permission(self, request: Request, view: APIView, obj: Any) -> bool:
        resource = getattr(view, "resource", None)
        if resource is not None:
            organization_id, area = view.place_of(obj)  # type: ignore[attr-defined]
            access_of(request).demand(verb_of(request, view), resource, organization_id, area=area)
        return True


_VERBS: Mapping[str, Verb] = {
    "create": "add",
    "update": "change",
    "partial_update": "change",
    "destroy": "delete",
}
# REST framework answers OPTIONS with the fields of the methods that the person may use, and asks for each of them.
_ACTIONS_OF_METADATA: Mapping[str, str] = {"POST": "create", "PUT": "update"}


def verb_of(request: Request, view: APIView) -> Verb:
    """The verb of the action under way: one of REST framework's own, or one that the view names in its `verbs`.

    KeyError when nobody has said which verb a new action is. A method that does not exist needs no right: it is a 405 for
    everybody.
    """
    action = getattr(view, "action", None)
    if request.method in SAFE_METHODS or action is None:
        return "view"
    verbs: Mapping[str, Verb] = {**_VERBS, **getattr(view, "verbs", {})}
    return verbs[_ACTIONS_OF_METADATA[request.method or ""] if action == "metadata" else action]
