"""Pages of the REST API: `page` and `pageSize` give {"count", "next", "previous", "results"}."""

from __future__ import annotations

from typing import Any

from rest_framework.exceptions import ValidationError
from rest_framework.pagination import PageNumberPagination
from rest_framework.request import Request

MAXIMUM_PAGE = 1_000_000_000


class Pagination(PageNumberPagination):
    """A number that cannot be is refused; REST framework would silently give another one. Past the last page is a 404."""

    page_size = 50
    page_size_query_param = "pageSize"
    max_page_size = 500

    def get_page_number(self, request: Request, paginator: Any) -> int | str:
        return self._number(request, self.page_query_param, MAXIMUM_PAGE) or 1

    def get_page_size(self, request: Request) -> int | None:
        return self._number(request, self.page_size_query_param, self.max_page_size) or self.page_size

    def check(self, request: Request) -> None:
        """Refuses what `paginate_queryset` would refuse."""
        self.get_page_size(request)
        self.get_page_number(request, None)

    def get_schema_operation_parameters(self, view: Any) -> list[dict[str, Any]]:
        page, size = super().get_schema_operation_parameters(view)
        page["schema"] |= {"minimum": 1, "maximum": MAXIMUM_PAGE}
        size["schema"] |= {"minimum": 1, "maximum": self.max_page_size}
        return [page, size]

    def _number(self, request: Request, name: str, maximum: int) -> int | None:
        text = request.query_params.get(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and 0 < int(text) <= maximum):
            raise ValidationError({name: [f"{text[:30]!r} is not a whole number from 1 to {maximum}."]})
        return int(text)
