"""Who is behind an access token and what they may see: a JWT in, a Person out; no cookies, no protocol."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from django.contrib.auth import get_user_model
from rest_framework_simplejwt.authentication import JWTAuthentication
from rest_framework_simplejwt.exceptions import AuthenticationFailed, InvalidToken, TokenError
from rest_framework_simplejwt.tokens import AccessToken

from devices.exceptions import Unauthorized
from devices.models import Membership


@dataclass(frozen=True, slots=True)
class Person:
    """`expires_at` of the token in epoch seconds; `organizations` are uuids."""

    user_id: int
    expires_at: float
    organizations: frozenset[str]


def person(token: str) -> Person:
    """The person whose access token this is; Unauthorized with a sentence that says why not."""
    try:
        access = AccessToken(token)  # type: ignore[arg-type]  # annotated as a token, takes its text
        user = JWTAuthentication().get_user(access)
    except TokenError:
        raise Unauthorized("The access token is not valid or has expired.") from None
    except (AuthenticationFailed, InvalidToken):
        raise Unauthorized("The user of the access token does not exist or is not active.") from None
    return Person(user.pk, float(access["exp"]), organizations_of([user.pk]).get(user.pk, frozenset()))


def organizations_of(user_ids: Collection[int]) -> dict[int, frozenset[str]]:
    """User id -> uuids of the organizations they belong to, in any role; who is not active is missing. Two queries."""
    active = get_user_model().objects.filter(pk__in=user_ids, is_active=True).values_list("pk", flat=True)
    found: dict[int, set[str]] = {user_id: set() for user_id in active}
    memberships = Membership.objects.filter(user_id__in=list(found))
    for user_id, organization in memberships.values_list("user_id", "organization__uuid"):
        found[user_id].add(str(organization))
    return {user_id: frozenset(organizations) for user_id, organizations in found.items()}
