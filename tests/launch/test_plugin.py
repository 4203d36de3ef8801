"""``?plugin=fairpool`` in a database URL."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, engine_from_config, make_url, text
from sqlalchemy.exc import ArgumentError, SAWarning
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, QueuePool
from support.worlds import Tasks, world_of

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool
from sqla_fairpool.options import OPTIONS, PoolOptions

FILE = "sqlite:///file.db?plugin=fairpool"


def by_config(url):
    return engine_from_config({"sqlalchemy.url": url})


@pytest.mark.parametrize("create", [create_engine, by_config])
def test_url_alone_gives_the_pool_its_options_and_the_engine_its_tag(create, tmp_path):
    engine = create(
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
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "psycopg tasks", "asyncpg"])
def test_driver_does_not_see_the_keys(postgres_url, driver):
    keys = {"plugin": "fairpool", "fairpool_pool_size": "3", "fairpool_scraper": "a"}
    world = world_of(postgres_url, f"postgresql+{driver}")
    world.url = world.url.update_query_dict(keys)
    is_asyncio = isinstance(world, Tasks)

    @world.run
    def test():
        engine = world.make(world.url)
        cls = AsyncAdaptedFairQueuePool if is_asyncio else FairQueuePool
        assert type(engine.pool) is cls
        assert engine.pool.size() == 3
        with engine.connect() as connection:
            assert connection.scalar(text("select 1")) == 1
            assert engine.pool.stats().tag("a").connections == 1
        engine.dispose()


IN_MEMORY = [
    (create_engine, FairQueuePool, "sqlite://?"),
    (create_engine, FairQueuePool, "sqlite:///:memory:?"),
    (create_engine, FairQueuePool, "sqlite:///file::memory:?uri=true&"),
    (create_engine, FairQueuePool, "sqlite:///file:a?mode=memory&uri=true&"),
    (create_async_engine, AsyncAdaptedFairQueuePool, "sqlite+aiosqlite://?"),
]


@pytest.mark.filterwarnings("ignore:Selection of the:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:Selection of the:sqlalchemy.exc.SADeprecationWarning"
)
@pytest.mark.parametrize(("create", "fair", "url"), IN_MEMORY)
def test_database_in_memory_keeps_sqlalchemys_pool_with_a_warning(create, fair, url):
    """Each of the fair pool's connections would have one of its own."""
    with pytest.warns(SAWarning, match="leaves SQLAlchemy's pool to this eng") as seen:
        engine = create(f"{url}plugin=fairpool&fairpool_pool_size=3")
    assert [w.filename for w in seen if w.category is SAWarning] == [__file__]
    assert type(engine.pool) is type(create(url.rstrip("?&")).pool)
    with pytest.warns(SAWarning, match=f"{fair.__name__} is of no use here") as seen:
        create(url.rstrip("?&"), poolclass=fair)
    assert [w.filename for w in seen] == [__file__]


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


OTHERS = {
    "tag_option": "tenant",
    "default_tag": "a",
    "ledger": "/run/a.ledger",
    "max_limit": "18",
    "tags": '{"api": {"weight": 3}}',
}
VALUES = [(name, OTHERS.get(name, "1")) for name in OPTIONS]
VALUES += [(name, "None") for name, option in OPTIONS.items() if option.none]


@pytest.mark.parametrize(("name", "given"), VALUES)
def test_every_option_of_the_pool_has_a_key(name, given):
    url = make_url(FILE).update_query_dict({f"fairpool_{name}": given})
    if name == "server_tag":
        url = url.set(drivername="postgresql+psycopg2")
    found = getattr(create_engine(url).pool.options, name)
    value = None if given == "None" else given
    assert found == getattr(PoolOptions.parse(**{name: value}), name)
    assert given != "None" or found is None


def test_other_keys_of_the_pool():
    engine = create_engine(
        f"{FILE}&fairpool_use_lifo=yes&fairpool_recycle=60&fairpool_pre_ping=off"
    )
    assert engine.pool._recycle == 60
    assert engine.pool._pre_ping is False


def test_keyword_arguments_win_over_the_url():
    keys = "fairpool_pool_size=5&fairpool_timeout=1&fairpool_scraper=url"
    options = {"scraper": "argument"}
    engine = create_engine(
        f"{FILE}&{keys}", pool_size=6, pool_timeout=2, execution_options=options
    )
    assert (engine.pool.size(), engine.pool.timeout()) == (6, 2)
    assert engine.get_execution_options()["scraper"] == "argument"
    options = {"logging_token": "x"}
    engine = create_engine(f"{FILE}&fairpool_scraper=a", execution_options=options)
    assert options == {"logging_token": "x"}  # the caller's own dictionary
    assert engine.get_execution_options() == {"scraper": "a", "logging_token": "x"}


def test_tag_goes_under_the_option_that_the_pool_reads():
    engine = create_engine(
        f"{FILE}&fairpool_tag_option=tenant&fairpool_scraper=a&fairpool_default_tag=b"
    )
    assert engine.get_execution_options() == {"tenant": "a"}
    assert engine.pool.options.default_tag == "b"


@pytest.mark.parametrize("poolclass", [NullPool, QueuePool])
def test_pool_or_its_class_of_the_caller_is_left_alone(server, poolclass):
    url = f"{FILE}&fairpool_soft_limit=8"
    engine = create_engine(url, poolclass=poolclass)
    assert type(engine.pool) is poolclass
    assert engine.url.query == {}
    pool = poolclass(server.connect)
    assert create_engine(url, pool=pool).pool is pool


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("softlimit=8", "unknown key 'fairpool_softlimit' in the database URL"),
        ("x=8", "the known ones are fairpool_scraper, fairpool_pool_size, "),
        ("soft_limit=x", "fairpool_soft_limit='x' is not allowed: a whole"),
        ("soft_limit=19", "fairpool_soft_limit='19' is not allowed: .* 15"),
        ("pool_size=0", "fairpool_pool_size='0' is not allowed"),
        ("timeout=-1", "fairpool_timeout='-1' is not allowed: seconds"),
        ("pre_ping=maybe", "fairpool_pre_ping='maybe' is not allowed: true"),
        ("recycle=1h", "fairpool_recycle='1h' is not allowed: a whole .* -1 for ne"),
        ("scraper=a%0A", r"fairpool_scraper=.a\\n. is not allowed: a tag is"),
        ("min_idle=1&fairpool_min_idle=2", "key 'fairpool_min_idle' stands tw"),
    ],
)
def test_bad_key_is_named(query, message):
    url = "postgresql+psycopg2://app:s3cret@localhost/app?plugin=fairpool"
    with pytest.raises(ArgumentError, match=message) as caught:
        create_engine(f"{url}&fairpool_{query}")
    assert "s3cret" not in str(caught.value)


def test_bad_argument_is_not_taken_for_a_key():
    with pytest.raises(ArgumentError, match=r"^soft_limit=99 is not allowed"):
        create_engine(f"{FILE}&fairpool_pool_size=5", soft_limit=99)
