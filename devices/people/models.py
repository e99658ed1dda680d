"""Tables of how people come in: invitations to organizations, and tokens of their own for scripts."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import models, transaction
from django.utils import timezone

from devices.units import Units

if TYPE_CHECKING:
    from devices.models import Membership

INVITATION_DAYS = 7
SECRET_BYTES = 32
PERSONAL = "aemosp_"
SEEN_EVERY = timedelta(minutes=1)


def digest_of(token: str) -> str:
    """A token has 256 random bits, so that a plain hash is as good as a slow one."""
    return hashlib.sha256(token.encode()).hexdigest()


def in_a_week() -> Any:
    return timezone.now() + timedelta(days=INVITATION_DAYS)


class CannotJoin(Exception):
    """Says in a sentence why an invitation lets nobody in."""


class InvitationQuerySet(models.QuerySet["Invitation"]):
    def issue(self, **fields: Any) -> tuple[Invitation, str]:
        """The new invitation, and its token, which is not kept."""
        token = secrets.token_urlsafe(SECRET_BYTES)
        return self.create(digest=digest_of(token), **fields), token

    def of(self, token: str) -> Invitation:
        """The open invitation of a token. Raises CannotJoin."""
        found = self.filter(digest=digest_of(token)).select_related("organization").first()
        if found is None:
            raise CannotJoin("There is no such invitation; perhaps it was withdrawn.")
        if found.accepted_at is not None:
            raise CannotJoin("This invitation was used before.")
        if found.expires_at <= timezone.now():
            raise CannotJoin("This invitation has expired; ask for a new one.")
        return found


class Invitation(models.Model):
    """Whoever has its link may join an organization, once, with the role that it names: nobody is made a member unasked."""

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    organization = models.ForeignKey("devices.Organization", on_delete=models.CASCADE, related_name="invitations")
    role = models.CharField(max_length=20, default="viewer")
    # Withdrawn with its area.
    area = models.ForeignKey(
        "devices.Area", null=True, blank=True, on_delete=models.CASCADE, related_name="+",
        help_text="Limits an operator to an area and its parts.",
    )  # fmt: skip
    note = models.CharField(max_length=200, blank=True, help_text="Whom it is for.")
    digest = models.CharField(max_length=64, unique=True, editable=False)
    created_by = models.CharField(max_length=150, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    expires_at = models.DateTimeField(default=in_a_week, help_text="Until then it can be used; a week if left out.")
    accepted_at = models.DateTimeField(null=True, blank=True, editable=False)
    accepted_by = models.CharField(max_length=150, blank=True, editable=False)

    objects = InvitationQuerySet.as_manager()

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"{self.role} of {self.organization}" + (f", for {self.note}" if self.note else "")

    def clean(self) -> None:
        from devices.areas.models import check_limit, check_place
        from devices.models import Role

        if self.role not in Role.values:
            raise ValidationError({"role": f"must be one of {', '.join(Role.values)}"})
        if self._state.adding and self.expires_at <= timezone.now():
            raise ValidationError({"expires_at": "must be in the future"})
        check_place(self)
        check_limit(self.role, self.area)

    def accept(self, user: Any) -> Membership:
        """Makes the user a member. Raises CannotJoin, also when somebody else was quicker."""
        from devices.models import Membership

        with transaction.atomic():
            if Membership.objects.filter(user=user, organization=self.organization_id).exists():
                raise CannotJoin("You belong to this organization already.")
            open_ones = Invitation.objects.filter(pk=self.pk, accepted_at=None)
            if not open_ones.update(accepted_at=timezone.now(), accepted_by=user.get_username()):
                raise CannotJoin("This invitation was used before.")
            return Membership.objects.create(
                user=user, organization_id=self.organization_id, role=self.role, area=self.area
            )


class Preferences(models.Model):
    """How one person wants to see the pages. What is empty is as the browser says it, or as sensors report it."""

    user = models.OneToOneField(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, primary_key=True, related_name="preferences"
    )
    language = models.CharField(max_length=10, blank=True)
    time_zone = models.CharField(max_length=63, blank=True)
    temperature = models.CharField(max_length=20, blank=True)
    conductivity = models.CharField(max_length=20, blank=True)

    class Meta:
        verbose_name_plural = "preferences"

    def __str__(self) -> str:
        return f"preferences of {self.user}"

    @property
    def units(self) -> Units:
        return Units(self.temperature, self.conductivity)


class ApiTokenQuerySet(models.QuerySet["ApiToken"]):
    def issue(self, **fields: Any) -> tuple[ApiToken, str]:
        """The new token's row, and the token, which is not kept."""
        token = PERSONAL + secrets.token_urlsafe(SECRET_BYTES)
        return self.create(digest=digest_of(token), prefix=token[: len(PERSONAL) + 6], **fields), token

    def live(self) -> ApiTokenQuerySet:
        not_expired = models.Q(expires_at=None) | models.Q(expires_at__gt=timezone.now())
        return self.filter(not_expired, revoked_at=None, user__is_active=True)

    def of(self, token: str) -> ApiToken | None:
        return self.live().select_related("user").filter(digest=digest_of(token)).first()


class ApiToken(models.Model):
    """Lets a script do in its owner's name what a role allows: at most that of the owner, and at most the one named here."""

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_tokens")
    name = models.CharField(max_length=100, help_text="What it is for, such as Grafana.")
    role = models.CharField(max_length=20, default="viewer", help_text="The most that it allows.")
    prefix = models.CharField(max_length=20, editable=False, help_text="How the token begins, to tell which one it is.")
    digest = models.CharField(max_length=64, unique=True, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    expires_at = models.DateTimeField(null=True, blank=True, help_text="null: never.")
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False, help_text="To the minute.")

    objects = ApiTokenQuerySet.as_manager()

    class Meta:
        ordering = ["-created_at"]
        verbose_name = "API token"

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}…)"

    def clean(self) -> None:
        if self._state.adding and self.expires_at is not None and self.expires_at <= timezone.now():
            raise ValidationError({"expires_at": "must be in the future"})

    def saw_use(self) -> None:
        now = timezone.now()
        if self.last_used_at is None or now - self.last_used_at >= SEEN_EVERY:
            ApiToken.objects.filter(pk=self.pk).update(last_used_at=now)
