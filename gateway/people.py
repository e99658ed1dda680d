"""Who is behind an access token and what they may see: a JWT in, a Person out; no cookies, no protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from django.contrib.auth import get_user_model
from rest_framework_simplejwt.authentication import JWTAuthentication
from rest_framework_simplejwt.exceptions import AuthenticationFailed, InvalidToken, TokenError
from rest_framework_simplejwt.tokens import AccessToken

from devices.exceptions import Unauthorized
from devices.models import Membership


@dataclass(frozen=True, slots=True)
class Person:
    """`expires_at` of the token in epoch seconds; `organizations`: uuid -> the person's role there."""

    user_id: int
    expires_at: float
    organizations: Mapping[str, str]


def person(token: str) -> Person:
    """The person whose access token this is; Unauthorized with a sentence that says why not."""
    try:
        access = AccessToken(token)  # type: ignore[arg-type]  # annotated as a token, takes its text
        user = JWTAuthentication().get_user(access)
    except TokenError:
        raise Unauthorized("The access token is not valid or has expired.") from None
    except (AuthenticationFailed, InvalidToken):
        raise Unauthorized("The user of the access token does not exist or is not active.") from None
    return Person(user.pk, float(access["exp"]), organizations_of([user.pk]).get(user.pk, {}))


def organizations_of(user_ids: Collection[int]) -> dict[int, dict[str, str]]:
    """User id -> organizations they belong to, uuid -> role; who is not active is missing. Two queries."""
    active = get_user_model().objects.filter(pk__in=user_ids, is_active=True).values_list("pk", flat=True)
    found: dict[int, dict[str, str]] = {user_id: {} for user_id in active}
    memberships = Membership.objects.filter(user_id__in=list(found))
    for user_id, organization, role in memberships.values_list("user_id", "organization__uuid", "role"):
        found[user_id][str(organization)] = role
    return found
