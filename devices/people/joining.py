"""Accept an invitation, with an account or with one that is made for it."""

from __future__ import annotations

from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from devices.models import Invitation, Membership


def join(user: Any, *, token: str, username: str = "", password: str = "") -> Membership:
    """Accepts an invitation for the user, or for a new one when nobody is logged in.

    Raises CannotJoin, and Django's ValidationError by field: the name is taken, the password too weak, or one is missing.
    """
    invitation = Invitation.objects.of(token)
    with transaction.atomic():
        return invitation.accept(user if user.is_authenticated else _account(username, password))


def _account(username: str, password: str) -> Any:
    model = get_user_model()
    given = {"username": username, "password": password}
    if missing := [name for name, value in given.items() if not value]:
        raise ValidationError(dict.fromkeys(missing, "This field is required to create an account."))
    user = model(username=username)
    try:
        user.full_clean(exclude=["password"])
        validate_password(password, user)
    except ValidationError as error:
        raise error if hasattr(error, "error_dict") else ValidationError({"password": error.messages}) from error
    user.set_password(password)
    try:
        user.save()
    except IntegrityError as error:
        raise ValidationError({"username": "A user with that username already exists."}) from error
    return user
