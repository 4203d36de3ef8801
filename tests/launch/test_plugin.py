"""``?plugin=fairpool`` in a database URL."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import create_engine, engine_from_config, make_url, text
from sqlalchemy.exc import ArgumentError, SAWarning
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool
from sqla_fairpool.options import OPTIONS, PoolOptions

FILE = "sqlite:///file.db?plugin=fairpool"


def test_url_alone_gives_the_pool_its_options_and_the_engine_its_tag(tmp_path):
    engine = create_engine(
        f"sqlite:///{tmp_path / 'file.db'}?plugin=fairpool&fairpool_soft_limit=8"
        "&fairpool_max_limit=12&fairpool_timeout=2.5&fairpool_scraper=layer3"
    )
    assert type(engine.pool) is FairQueuePool
    options = engine.pool.options
    assert (options.soft_limit, options.max_limit, options.timeout) == (8, 12, 2.5)
    assert engine.url.query == {}
    with engine.connect() as connection:
        connection.execute(text("select 1"))
        assert engine.pool.stats().tag("layer3").connections == 1
    engine.dispose()


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_driver_does_not_see_the_keys(postgres_url, driver):
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}")
    url = url.update_query_dict({"plugin": "fairpool", "fairpool_pool_size": "3"})
    engine = create_engine(url)
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    assert engine.pool.size() == 3
    engine.dispose()


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_asyncio_dialect_gets_the_asyncio_class(postgres_url, driver):
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}")
    url = url.update_query_dict({"plugin": "fairpool", "fairpool_scraper": "a"})

    async def main():
        engine = create_async_engine(url)
        assert type(engine.pool) is AsyncAdaptedFairQueuePool
        async with engine.connect() as connection:
            assert await connection.scalar(text("select 1")) == 1
            assert engine.pool.stats().tag("a").connections == 1
        await engine.dispose()

    asyncio.run(main())


IN_MEMORY = [
    "sqlite://?",
    "sqlite:///:memory:?",
    "sqlite:///file::memory:?uri=true&",
    "sqlite:///file:a?mode=memory&uri=true&",
]


@pytest.mark.filterwarnings("ignore:Selection of the:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:Selection of the:sqlalchemy.exc.SADeprecationWarning"
)
@pytest.mark.parametrize("url", IN_MEMORY)
def test_database_in_memory_keeps_sqlalchemys_pool_with_a_warning(url):
    """Each of the fair pool's connections would have one of its own."""
    with pytest.warns(SAWarning, match="leaves SQLAlchemy's pool to this eng") as seen:
        engine = create_engine(f"{url}plugin=fairpool&fairpool_pool_size=3")
    assert [w.filename for w in seen if w.category is SAWarning] == [__file__]
    assert type(engine.pool) is type(create_engine(url.rstrip("?&")).pool)
    with pytest.warns(SAWarning, match="FairQueuePool is of no use here: each") as seen:
        create_engine(url.rstrip("?&"), poolclass=FairQueuePool)
    assert [w.filename for w in seen] == [__file__]


def test_database_in_memory_of_asyncio_keeps_sqlalchemys_pool():
    with pytest.warns(SAWarning, match="leaves SQLAlchemy's pool") as seen:
        engine = create_async_engine("sqlite+aiosqlite://?plugin=fairpool")
    assert [w.filename for w in seen] == [__file__]
    assert type(engine.pool) is StaticPool
    with pytest.warns(SAWarning, match="AsyncAdaptedFairQueuePool is of no use here"):
        create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedFairQueuePool)


def test_shared_cache_in_memory_gets_the_pool():
    url = "sqlite:///file:plugin?mode=memory&cache=shared&uri=true"
    engine = create_engine(f"{url}&plugin=fairpool")
    assert type(engine.pool) is FairQueuePool
    with engine.begin() as one, engine.connect() as two:
        one.execute(text("create table t (x int)"))
        assert two.execute(text("select 1")).scalar() == 1
    with engine.connect() as other:
        assert other.execute(text("select count(*) from t")).scalar() == 0
    engine.dispose()


def test_creator_or_a_single_connection_is_no_harm_in_memory(server):
    creator = server.connect
    assert type(create_engine("sqlite://?plugin=fairpool", creator=creator).pool) is (
        FairQueuePool
    )
    create_engine("sqlite://", poolclass=FairQueuePool, creator=creator)
    create_engine("sqlite://", poolclass=FairQueuePool, pool_size=1)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_the_pool_has_a_key(name):
    others = {"tag_option": "tenant", "default_tag": "a", "ledger": "/run/a.ledger"}
    others["max_limit"] = "18"
    given = others.get(name, "1")
    url = make_url(FILE).update_query_dict({f"fairpool_{name}": given})
    if name == "server_tag":
        url = url.set(drivername="postgresql+psycopg2")
    options = create_engine(url).pool.options
    assert getattr(options, name) == getattr(PoolOptions.parse(**{name: given}), name)


NULLABLE = [name for name, option in OPTIONS.items() if option.none]


@pytest.mark.parametrize("name", NULLABLE)
def test_none_is_what_none_means(name):
    engine = create_engine(f"{FILE}&fairpool_{name}=None")
    assert getattr(engine.pool.options, name) is None


def test_other_keys_of_the_pool():
    engine = create_engine(
        f"{FILE}&fairpool_use_lifo=yes&fairpool_recycle=60&fairpool_pre_ping=off"
    )
    assert engine.pool._recycle == 60
    assert engine.pool._pre_ping is False


def test_keyword_arguments_win_over_the_url():
    engine = create_engine(
        f"{FILE}&fairpool_pool_size=5&fairpool_timeout=1&fairpool_scraper=url",
        pool_size=6,
        pool_timeout=2,
        execution_options={"scraper": "argument"},
    )
    assert engine.pool.size() == 6
    assert engine.pool.timeout() == 2
    assert engine.get_execution_options()["scraper"] == "argument"


def test_caller_s_own_dictionary_is_left_as_it_is():
    options = {"logging_token": "x"}
    engine = create_engine(f"{FILE}&fairpool_scraper=a", execution_options=options)
    assert options == {"logging_token": "x"}
    assert engine.get_execution_options() == {"scraper": "a", "logging_token": "x"}


def test_tag_goes_under_the_option_that_the_pool_reads():
    engine = create_engine(
        f"{FILE}&fairpool_tag_option=tenant&fairpool_scraper=a&fairpool_default_tag=b"
    )
    assert engine.get_execution_options() == {"tenant": "a"}
    assert engine.pool.options.default_tag == "b"


@pytest.mark.parametrize("poolclass", [NullPool, QueuePool])
def test_pool_class_of_the_caller_is_left_alone(poolclass):
    engine = create_engine(f"{FILE}&fairpool_soft_limit=8", poolclass=poolclass)
    assert type(engine.pool) is poolclass
    assert engine.url.query == {}


def test_pool_of_the_caller_is_left_alone(server):
    pool = QueuePool(server.connect)
    assert create_engine(f"{FILE}&fairpool_soft_limit=8", pool=pool).pool is pool


def test_works_through_engine_from_config():
    engine = engine_from_config({"sqlalchemy.url": f"{FILE}&fairpool_pool_size=7"})
    assert type(engine.pool) is FairQueuePool
    assert engine.pool.size() == 7


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            "fairpool_softlimit=8",
            "unknown key 'fairpool_softlimit' in the database URL",
        ),
        ("fairpool_x=8", "the known ones are fairpool_scraper, fairpool_pool_size, "),
        ("fairpool_soft_limit=x", "fairpool_soft_limit='x' is not allowed: a whole"),
        ("fairpool_soft_limit=19", "fairpool_soft_limit='19' is not allowed: .* 15"),
        ("fairpool_pool_size=0", "fairpool_pool_size='0' is not allowed"),
        ("fairpool_timeout=-1", "fairpool_timeout='-1' is not allowed: seconds"),
        ("fairpool_pre_ping=maybe", "fairpool_pre_ping='maybe' is not allowed: true"),
        ("fairpool_recycle=1h", "fairpool_recycle='1h' is not allowed: whole seconds"),
        ("fairpool_scraper=a%0A", r"fairpool_scraper=.a\\n. is not allowed: a tag is"),
        (
            "fairpool_min_idle=1&fairpool_min_idle=2",
            "key 'fairpool_min_idle' stands tw",
        ),
    ],
)
def test_bad_key_is_named(query, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        create_engine(
            f"postgresql+psycopg2://app:s3cret@localhost/app?plugin=fairpool&{query}"
        )
    assert "s3cret" not in str(caught.value)


def test_bad_argument_is_not_taken_for_a_key():
    with pytest.raises(ArgumentError, match=r"^soft_limit=99 is not allowed"):
        create_engine(f"{FILE}&fairpool_pool_size=5", soft_limit=99)
