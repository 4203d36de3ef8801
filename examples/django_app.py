"""Django: a backend of fifty lines, and a middleware that tags each request.

    DATABASE_URL=postgresql+psycopg2://app@localhost/app python django_app.py

A tenant is a tag here: one tenant's reports cannot take the connections of the others.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import django
from django.conf import settings
from django.core.signals import request_finished
from django.db import connection
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import path
from fair_django.base import pools
from sqlalchemy import make_url

from sqla_fairpool import tag


class TagByTenant:
    """Middleware: what a view asks of the database counts for the tenant."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        with tag(request.headers.get("X-Tenant", "nobody")):
            return self.get_response(request)


def holders() -> dict[str, int]:
    """Return how many connections each tag holds at this moment."""
    rows = pools["default"].stats().tags
    return {row.name: row.connections for row in rows if row.connections}


def report(request: HttpRequest) -> HttpResponse:
    with connection.cursor() as cursor:
        cursor.execute("select 1")
    return HttpResponse(str(holders()))


urlpatterns = [path("", report)]


def configure(database_url: str) -> None:
    url = make_url(database_url)
    database = {
        "ENGINE": "fair_django",
        "NAME": url.database,
        "USER": url.username,
        "PASSWORD": url.password,
        "HOST": url.host or url.query.get("host", ""),
        "PORT": url.port or "",
        "OPTIONS": {"fairpool": {"pool_size": 4, "timeout": 10}},
    }
    settings.configure(
        ALLOWED_HOSTS=["*"],
        DATABASES={"default": database},
        MIDDLEWARE=[f"{__name__}.TagByTenant"],
        ROOT_URLCONF=__name__,
    )
    django.setup()


def visit(tenant: str) -> None:
    answer = Client().get("/", headers={"X-Tenant": tenant})
    print(tenant, answer.content.decode())
    request_finished.send(sender=None)  # what a server does


def main() -> None:
    configure(os.environ["DATABASE_URL"])
    for tenant in ("acme", "umbrella"):
        visitor = threading.Thread(target=visit, args=(tenant,))
        visitor.start()
        visitor.join()
    stats = pools["default"].stats()
    print(f"still held: {holders()}; idle: {stats.idle}")
    pools["default"].dispose()


if __name__ == "__main__":
    main()
