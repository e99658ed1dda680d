"""The table of areas: a tree of places in an organization."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db import models
from django.utils import timezone

MAXIMUM_DEPTH = 8


class Area(models.Model):
    """A place: a site, a greenhouse in it, a bench in that. Sensors and devices stand in one, or in none."""

    uuid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    organization = models.ForeignKey("devices.Organization", on_delete=models.CASCADE, related_name="areas")
    parent = models.ForeignKey(
        "self", null=True, blank=True, on_delete=models.CASCADE, related_name="children",
        help_text="The area that it is a part of; none of the largest.",
    )  # fmt: skip
    name = models.CharField(max_length=100)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["parent", "name"], name="area_name_in_parent"),
            models.UniqueConstraint(
                fields=["organization", "name"],
                condition=models.Q(parent=None),
                name="area_name_in_organization",
                violation_error_message="There is already an area with this name that is no part of another.",
            ),
        ]
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        """Its organization is that of its parent, and nothing is a part of itself."""
        if self.parent is None:
            return
        if self.parent.organization_id != self.organization_id:
            raise ValidationError({"parent": "is an area of another organization"})
        above = list(ancestors(self.parent))
        if self.pk and any(each.pk == self.pk for each in above):
            raise ValidationError({"parent": "is this area itself, or a part of it"})
        if len(above) >= MAXIMUM_DEPTH:
            raise ValidationError({"parent": f"is {MAXIMUM_DEPTH} areas deep already, which is the most"})


def ancestors(area: Area) -> Iterator[Area]:
    """The area, and those that it is a part of, from the inside out; of a ring, which two moves at once may make, each once."""
    here: Area | None = area
    seen: set[int | None] = set()
    while here is not None and here.pk not in seen:
        yield here
        seen.add(here.pk)
        here = here.parent


def tree(areas: Iterable[Area]) -> list[tuple[Area, int]]:
    """All of one organization, each after what it is a part of, with how deep it lies."""
    below: dict[int | None, list[Area]] = {}
    for area in sorted(areas, key=lambda each: each.name):
        below.setdefault(area.parent_id, []).append(area)
    found: list[tuple[Area, int]] = []

    def walk(parent: int | None, depth: int) -> None:
        for area in below.get(parent, ()):
            found.append((area, depth))
            walk(area.pk, depth + 1)

    walk(None, 0)
    return found


def within(area: Area) -> list[int]:
    """The ids of the area and of all that is a part of it; one query."""
    areas = tree(Area.objects.filter(organization=area.organization_id))
    ids = [area.pk]
    place = next((position for position, (each, _) in enumerate(areas) if each.pk == area.pk), None)
    if place is None:  # part of a ring
        return ids
    for each, depth in areas[place + 1 :]:
        if depth <= areas[place][1]:
            break
        ids.append(each.pk)
    return ids


def check_place(row: Any) -> None:
    """Of what stands in, or is limited to, an area: that this is one of its own organization. Raises ValidationError."""
    if row.area is not None and row.area.organization_id != row.organization_id:
        raise ValidationError({"area": "is an area of another organization"})


def check_limit(role: str, area: Area | None) -> None:
    """Raises ValidationError for roles that no area limits: viewers change nothing, and admins care for all of it."""
    if area is not None and role != "operator":
        raise ValidationError({"area": "limits operators only: leave it empty for other roles"})


def people_of(area: Area) -> list[str]:
    """The names of those who are limited to the area or a part of it: while there are any, it cannot be deleted."""
    limited = get_user_model()._default_manager.filter(memberships__area__in=within(area)).order_by("username")
    return list(limited.values_list("username", flat=True))
