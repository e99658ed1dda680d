"""Fields of the admin that take no harm from what people mistype and programs send, where Django's own fail with a 500."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.widgets import AutocompleteMixin, AutocompleteSelect, AutocompleteSelectMultiple
from django.db.models import JSONField
from django.http import HttpRequest

if TYPE_CHECKING:
    _BaseModelAdmin = admin.options.BaseModelAdmin[Any]
else:
    _BaseModelAdmin = object
# In digits; the largest id has 19.
LONGEST_ID = 19


def _can_be_id(text: str) -> bool:
    """Or empty, where nothing was chosen."""
    return not text or (text.isdecimal() and len(text) < LONGEST_ID)


class ShallowDecoder(json.JSONDecoder):
    """What is nested too deeply is no JSON, as any other mistake."""

    def decode(self, s: str, *args: Any) -> Any:
        try:
            return super().decode(s, *args)
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", s, 0) from None


class _Ids(AutocompleteMixin):
    """Looks up what was sent, in a form shown again or a parameter, as far as it can be an id."""

    def optgroups(self, name: str, value: Sequence[str], attr: dict[str, Any] | None = None) -> Any:
        return super().optgroups(name, [each for each in value if _can_be_id(each)], attr)


class _One(_Ids, AutocompleteSelect):
    """For a foreign key."""


class _Several(_Ids, AutocompleteSelectMultiple):
    """For many to many."""


class ForgivingFields(_BaseModelAdmin):
    """For pages and inlines of the admin."""

    def formfield_for_dbfield(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        if isinstance(db_field, JSONField):
            kwargs["decoder"] = ShallowDecoder
        elif db_field.name in self.get_autocomplete_fields(request):
            kwargs["widget"] = (_Several if db_field.many_to_many else _One)(db_field, self.admin_site)
        return super().formfield_for_dbfield(db_field, request, **kwargs)
