"""Flask-SQLAlchemy: only the URL is ours, and one line tags each request.

    DATABASE_URL=postgresql+psycopg2://app@localhost/app python flask_app.py

A blueprint is a tag here, so the reports cannot take the connections of the shop.
"""

from __future__ import annotations

import os
import tempfile
import threading

from flask import Blueprint, Flask, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import make_url, text

from sqla_fairpool import set_tag

db = SQLAlchemy()
shop = Blueprint("shop", __name__)
reports = Blueprint("reports", __name__)


def create_app(database_url: str) -> Flask:
    """Return the application. The plugin in its URL is all that the pool needs."""
    app = Flask(__name__)
    url = make_url(database_url).update_query_dict({"plugin": "fairpool"})
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.register_blueprint(shop, url_prefix="/shop")
    app.register_blueprint(reports, url_prefix="/reports")
    db.init_app(app)

    # The thread may serve any request next, so it is tagged anew each time.
    app.before_request(lambda: set_tag(request.blueprint))
    app.teardown_request(lambda error: set_tag(None))
    return app


def holders() -> dict[str, int]:
    """Return how many connections each tag holds at this moment."""
    rows = db.engine.pool.stats().tags
    return {row.name: row.connections for row in rows if row.connections}


@shop.get("/")
def basket() -> dict[str, int]:
    db.session.execute(text("select 1"))
    return holders()


@reports.get("/")
def report() -> dict[str, int]:
    db.session.execute(text("select 1"))
    return holders()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = f"sqlite:///{folder}/flask.db"
        app = create_app(os.environ.get("DATABASE_URL", file))

        def visit(path: str) -> None:
            print(path, app.test_client().get(path).get_json())

        for path in ("/shop/", "/reports/"):
            visitor = threading.Thread(target=visit, args=(path,))
            visitor.start()
            visitor.join()
        with app.app_context():
            print("still held:", holders())
            db.engine.dispose()


if __name__ == "__main__":
    main()
