"""Pages of the REST API: `page` and `pageSize` in, {"count", "next", "previous", "results"} out."""

from __future__ import annotations

from rest_framework.pagination import PageNumberPagination


class Pagination(PageNumberPagination):
    page_size = 50
    page_size_query_param = "pageSize"
    max_page_size = 500
