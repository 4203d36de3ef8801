"""FastAPI with AsyncSession: a tag per tenant by a middleware, or per route.

    DATABASE_URL=postgresql+asyncpg://app@localhost/app python fastapi_app.py

A middleware is plain ASGI: it runs in the task of the request, so a context
variable that it sets is seen by dependencies and endpoints. (Starlette's
``BaseHTTPMiddleware`` runs the endpoint in another task; plain ASGI costs less.)
"""

# No `from __future__ import annotations`: FastAPI reads annotations at run time.

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import httpx
from fastapi import Depends, FastAPI, Request
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from sqla_fairpool import AsyncAdaptedFairQueuePool, tag


class TagByTenant:
    """Tag what a request checks out with its tenant, a header here."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        tenant = dict(scope.get("headers", ())).get(b"x-tenant", b"public").decode()
        with tag(tenant):
            await self.app(scope, receive, send)


async def any_session(request: Request) -> AsyncIterator[AsyncSession]:
    """A session under the request's own tag."""
    async with AsyncSession(request.app.state.engine) as session:
        yield session


async def export_session(request: Request) -> AsyncIterator[AsyncSession]:
    """A session for the routes that export: one tag for all of them."""
    engine = request.app.state.engine.execution_options(scraper="exports")
    async with AsyncSession(engine) as session:
        yield session


def holders(engine: AsyncEngine) -> dict[str, int]:
    """Return how many connections each tag holds at this moment."""
    rows = engine.pool.stats().tags
    return {row.name: row.connections for row in rows if row.connections}


def create_app(database_url: str, **pool_options) -> FastAPI:
    """Return the application; its engine lives as long as it does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        app.state.engine = create_async_engine(
            database_url, poolclass=AsyncAdaptedFairQueuePool, **pool_options
        )
        yield
        await app.state.engine.dispose()

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(TagByTenant)

    @app.get("/orders")
    async def orders(session: Annotated[AsyncSession, Depends(any_session)]):
        await session.execute(text("select 1"))
        return holders(app.state.engine)

    @app.get("/export")
    async def export(session: Annotated[AsyncSession, Depends(export_session)]):
        await session.execute(text("select 1"))
        return holders(app.state.engine)

    return app


async def visit(app: FastAPI) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        for path, tenant in (
            ("/orders", "acme"),
            ("/orders", "umbrella"),
            ("/export", "acme"),
        ):
            response = await client.get(path, headers={"x-tenant": tenant})
            print(path, tenant, response.json())


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = f"sqlite+aiosqlite:///{folder}/fastapi.db"
        app = create_app(os.environ.get("DATABASE_URL", file))
        async with app.router.lifespan_context(app):
            await visit(app)
            print("still held:", holders(app.state.engine))


if __name__ == "__main__":
    asyncio.run(main())
