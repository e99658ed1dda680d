"""Pages of the REST API: `page` and `pageSize` give {"count", "next", "previous", "results"}."""

from __future__ import annotations

from rest_framework.exceptions import ValidationError
from rest_framework.pagination import PageNumberPagination
from rest_framework.request import Request


class Pagination(PageNumberPagination):
    page_size = 50
    page_size_query_param = "pageSize"
    max_page_size = 500

    def get_page_size(self, request: Request) -> int | None:
        """A size that is no number is refused; REST framework would silently give the default."""
        size = request.query_params.get("pageSize") or "1"
        if not (size.isascii() and size.isdecimal() and int(size) > 0):
            raise ValidationError({"pageSize": [f"{size!r} is not a whole number from 1 on."]})
        return super().get_page_size(request)
