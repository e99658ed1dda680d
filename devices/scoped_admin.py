"""What every page of the admin shares: staff see and change what RIGHTS allows them in their own organizations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

from django import forms
from django.contrib import admin
from django.core.paginator import Paginator
from django.db.models import ForeignKey, Model, Q, QuerySet
from django.http import HttpRequest
from django.utils.functional import cached_property

from devices.forgiving import ForgivingFields
from devices.models import Organization
from devices.permissions import RIGHTS, Verb, access_of, id_at

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Any]
    _ModelForm = forms.ModelForm[Any]
    _Paginator = Paginator[Any]
    _Inline = admin.options.InlineModelAdmin[Any, Any]
    TabularInline = admin.TabularInline[Any, Any]
    StackedInline = admin.StackedInline[Any, Any]
else:
    _ModelAdmin, _ModelForm, _Paginator = admin.ModelAdmin, forms.ModelForm, Paginator
    _Inline, TabularInline, StackedInline = object, admin.TabularInline, admin.StackedInline

COUNTED_ROWS = 10_000


class FixedParentForm(_ModelForm):
    """A form whose page shows the parent read-only: the constraints that name the parent are still checked."""

    def _get_validation_exclusions(self) -> set[str]:
        excluded: set[str] = super()._get_validation_exclusions()  # type: ignore[misc]
        return excluded - {"organization", "sensor", "device", "user"} if self.instance.pk else excluded


class OrganizationListFilter(admin.SimpleListFilter):
    """The organizations that one may see, and no others."""

    title = "organization"
    parameter_name = "organization"

    def __init__(
        self, request: HttpRequest, params: dict[str, list[str]], model: type[Model], model_admin: Any
    ) -> None:
        self._path: str = model_admin.organization_path
        super().__init__(request, params, model, model_admin)

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        rows = access_of(request).limit(Organization.objects.all(), "pk", resource="organizations")
        return [(str(row.uuid), row.name) for row in rows]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        chosen = self.value()
        if chosen is None:
            return queryset
        organization = Organization.objects.filter(uuid=chosen).first() if as_uuid(chosen) else None
        return queryset.filter(**{self._path: organization.pk}) if organization else queryset.none()


class ScopedAdmin(ForgivingFields, _ModelAdmin):
    """A page of rows that belong to organizations. `fixed`: what cannot be changed once the row exists."""

    resource: ClassVar[str]
    organization_path: ClassVar[str] = "organization"
    area_path: ClassVar[str] = ""
    uuid_paths: ClassVar[Sequence[str]] = ("uuid",)
    fixed: ClassVar[Sequence[str]] = ("organization",)
    form = FixedParentForm
    readonly_fields: ClassVar[tuple[str, ...]] = ("uuid", "created_at")
    search_fields: ClassVar[tuple[str, ...]] = ("name",)
    search_help_text = "A part of the name, or a whole uuid"
    list_per_page = 50
    show_full_result_count = False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return access_of(request).limit(super().get_queryset(request), self.organization_path, resource=self.resource)

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may(request, "view", obj)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return self._may(request, "add", None)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may(request, "change", obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may(request, "delete", obj)

    def has_module_permission(self, request: HttpRequest) -> bool:
        return access_of(request).may_somewhere("view", self.resource)

    def _may(self, request: HttpRequest, verb: Verb, row: Any) -> bool:
        access = access_of(request)
        if row is None:
            return access.may_somewhere(verb, self.resource)
        area = id_at(row, self.area_path) if self.area_path else None
        return access.may(verb, self.resource, id_at(row, self.organization_path), area=area)

    def changeable(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Those of the rows that the person may change: for actions on what was selected."""
        return access_of(request).limit(
            queryset, self.organization_path, resource=self.resource, verb="change", area_path=self.area_path
        )

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        always = tuple(super().get_readonly_fields(request, obj))
        return always if obj is None else (*always, *self.fixed)

    def formfield_for_foreignkey(self, db_field: ForeignKey[Any, Any], request: HttpRequest, **kwargs: Any) -> Any:
        """Offers, and takes, only rows of organizations in which the person may write what this page holds."""
        target = self.admin_site._registry.get(db_field.related_model)
        if isinstance(target, ScopedAdmin):
            rows = target.model._default_manager.all()
            verb: Verb = "change" if RIGHTS[self.resource].change else "add"
            kwargs["queryset"] = access_of(request).limit(
                rows, target.organization_path, resource=self.resource, verb=verb
            )
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        uuid = as_uuid(search_term)
        if uuid is None:
            return super().get_search_results(request, queryset, search_term)
        found = Q()
        for path in self.uuid_paths:
            found |= Q(**{path: uuid})
        return queryset.filter(found), False

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[Any], list[Any]]:
        """Names the rows alone. Django's own answer loads all that goes with them, and a sensor may have millions of readings."""
        rows = list(objs)
        names = [f"{self.opts.verbose_name} {row}, with everything that belongs to it" for row in rows]
        denied = (
            {self.opts.verbose_name} if any(not self.has_delete_permission(request, row) for row in rows) else set()
        )
        return names, {str(self.opts.verbose_name_plural): len(rows)}, denied, []


class ScopedInline(ForgivingFields, _Inline):
    """Rows on the page of what they belong to, whose organization `parent_path` leads to from there."""

    resource: ClassVar[str]
    parent_path: ClassVar[str] = "organization"

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may(request, "view", obj)

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may(request, "add", obj)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may(request, "change", obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self._may(request, "delete", obj)

    def _may(self, request: HttpRequest, verb: Verb, parent: Any) -> bool:
        access = access_of(request)
        if parent is None:
            return access.may_somewhere(verb, self.resource)
        return access.may(verb, self.resource, id_at(parent, self.parent_path))


class ScopedTabularInline(ScopedInline, TabularInline):
    pass


class ScopedStackedInline(ScopedInline, StackedInline):
    pass


def as_uuid(text: str) -> UUID | None:
    try:
        return UUID(text.strip())
    except ValueError:
        return None


class BoundedPaginator(_Paginator):
    """Counts no further than COUNTED_ROWS, because nobody turns that many pages and counting millions takes seconds."""

    @cached_property
    def count(self) -> int:
        rows = self.object_list
        return rows[:COUNTED_ROWS].count() if isinstance(rows, QuerySet) else len(rows)


class RecordAdmin(ScopedAdmin):
    """A page of what the system wrote down: to look at. Tables of this kind grow without end."""

    paginator = BoundedPaginator
    readonly_fields: ClassVar[tuple[str, ...]] = ()
    fixed = ()

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class DisposableRecordAdmin(RecordAdmin):
    """Records that may also be thrown away, by whoever may delete them."""

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return ScopedAdmin.has_delete_permission(self, request, obj)
