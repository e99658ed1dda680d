"""Log in, get new access tokens, log out."""

from __future__ import annotations

from typing import Any

from django.utils.translation import gettext
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.exceptions import AuthenticationFailed, Throttled
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework_simplejwt.authentication import JWTAuthentication
from rest_framework_simplejwt.serializers import (
    TokenBlacklistSerializer,
    TokenObtainPairSerializer,
    TokenRefreshSerializer,
)
from rest_framework_simplejwt.views import TokenBlacklistView, TokenObtainPairView, TokenRefreshView

from devices.parsers import BoundedJSONParser
from devices.people import failures, second_factor
from devices.people.jwt import RefreshToken
from devices.serializers import StrictMixin


class LoginSerializer(StrictMixin, TokenObtainPairSerializer):
    """A user name and a password, and a code for who has a second factor."""

    token_class = RefreshToken
    otp = serializers.CharField(
        required=False,
        write_only=True,
        max_length=32,
        help_text="A code of the authenticator app, or a recovery code. Without it, who needs one gets 401 second-factor.",
    )

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        code = attrs.pop("otp", "")
        tokens: dict[str, Any] = super().validate(attrs)
        if second_factor.is_on(self.user) and not (code and second_factor.accepts(self.user, code)):
            raise AuthenticationFailed("The code (otp) is missing, wrong or used.", code="second-factor")
        return tokens


class RefreshSerializer(StrictMixin, TokenRefreshSerializer):
    """A refresh token."""

    token_class = RefreshToken

    def validate(self, attrs: dict[str, Any]) -> dict[str, str]:
        """Refused for a user who is gone, is not active, or has a new password since."""
        JWTAuthentication().get_user(self.token_class(attrs["refresh"]))
        found: dict[str, str] = super().validate(attrs)
        return found


class LogoutSerializer(StrictMixin, TokenBlacklistSerializer):
    """A refresh token."""


class TokenPairSerializer(serializers.Serializer[Any]):
    """What opens the API, and what gets the next pair."""

    access = serializers.CharField(
        help_text="Send it as `Authorization: Bearer <access>`; valid for JWT_ACCESS_MINUTES."
    )
    refresh = serializers.CharField(help_text="Good for one POST to /auth/refresh within JWT_REFRESH_DAYS.")


def tried(request: Any, username: Any) -> dict[failures.Limit, str]:
    """What a login from this request is counted by."""
    found = {failures.ADDRESS: failures.address_of(request.META)}
    return found | ({failures.ACCOUNT: username.casefold()} if isinstance(username, str) and username else {})


@extend_schema(
    tags=["auth"],
    summary="Log in",
    description="Ten failures from one address within a minute, or for one account within five, close the door for that time.",
    responses=TokenPairSerializer,
)
class LoginView(TokenObtainPairView):
    serializer_class = LoginSerializer
    parser_classes = [BoundedJSONParser]

    def post(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        data = request.data
        attempt = tried(request, data.get("username") if isinstance(data, dict) else None)
        closed = failures.seconds_closed(attempt)
        if closed:
            raise Throttled(wait=closed, detail=gettext("Too many failed logins."))
        try:
            return super().post(request, *args, **kwargs)
        except AuthenticationFailed:
            failures.count(attempt)
            raise


@extend_schema(
    tags=["auth"],
    summary="Get a new pair of tokens",
    description="The refresh token that was sent is used up. A new password ends all tokens of its user.",
    responses=TokenPairSerializer,
)
class RefreshView(TokenRefreshView):
    serializer_class = RefreshSerializer
    parser_classes = [BoundedJSONParser]


@extend_schema(
    tags=["auth"],
    summary="Log out",
    description="Ends the refresh token. An access token lasts until its time is over: forget it.",
    responses={204: None},
)
class LogoutView(TokenBlacklistView):
    serializer_class = LogoutSerializer
    parser_classes = [BoundedJSONParser]

    def post(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        super().post(request, *args, **kwargs)
        return Response(status=204)
