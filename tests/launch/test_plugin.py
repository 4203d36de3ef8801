"""``?plugin=fairpool`` in a database URL."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, engine_from_config, make_url, text
from sqlalchemy.exc import ArgumentError, SAWarning
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool, QueuePool
from support.worlds import Tasks, world_of

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool
from sqla_fairpool.manager import DynamicConnectionManager
from sqla_fairpool.options import OPTIONS, PoolOptions

FILE = "sqlite:///file.db?plugin=fairpool"


def made(keys, url=FILE, **arguments):
    return create_engine(f"{url}{keys.replace('&', '&fairpool_')}", **arguments)


@pytest.mark.parametrize("by_config", [False, True])
def test_url_alone_gives_the_pool_its_options_and_the_engine_its_tag(
    by_config, tmp_path
):
    url = (
        f"sqlite:///{tmp_path / 'file.db'}?plugin=fairpool&fairpool_soft_limit=8"
        "&fairpool_max_limit=12&fairpool_timeout=2.5&fairpool_scraper=layer3"
        "&fairpool_use_lifo=yes&fairpool_recycle=60&fairpool_pre_ping=off"
    )
    config = {"sqlalchemy.url": url}
    engine = engine_from_config(config) if by_config else create_engine(url)
    pool, options = engine.pool, engine.pool.options
    assert type(pool) is FairQueuePool
    assert (options.soft_limit, options.max_limit, options.timeout) == (8, 12, 2.5)
    assert (pool._recycle, pool._pre_ping) == (60, False)
    assert engine.url.query == {}
    with engine.connect() as connection:
        connection.execute(text("select 1"))
        assert pool.stats().tag("layer3").connections == 1
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
        assert (type(engine.pool), engine.pool.size()) == (cls, 3)
        with engine.connect() as connection:
            assert connection.scalar(text("select 1")) == 1
            assert engine.pool.stats().tag("a").connections == 1
        engine.dispose()


@pytest.mark.filterwarnings("ignore:Selection of the:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:Selection of the:sqlalchemy.exc.SADeprecationWarning"
)
@pytest.mark.parametrize(
    ("create", "fair", "url"),
    [
        (create_engine, FairQueuePool, "sqlite://?"),
        (create_engine, FairQueuePool, "sqlite:///:memory:?"),
        (create_engine, FairQueuePool, "sqlite:///file::memory:?uri=true&"),
        (create_engine, FairQueuePool, "sqlite:///file:a?mode=memory&uri=true&"),
        (create_async_engine, AsyncAdaptedFairQueuePool, "sqlite+aiosqlite://?"),
    ],
)
def test_database_in_memory_keeps_sqlalchemys_pool_with_a_warning(create, fair, url):
    """Each of the fair pool's connections would have one of its own."""
    with pytest.warns(SAWarning, match="leaves SQLAlchemy's pool to this eng") as seen:
        engine = create(f"{url}plugin=fairpool&fairpool_pool_size=3")
    assert [w.filename for w in seen if w.category is SAWarning] == [__file__]
    assert type(engine.pool) is type(create(url.rstrip("?&")).pool)
    with pytest.warns(SAWarning, match=f"{fair.__name__} is of no use here") as seen:
        create(url.rstrip("?&"), poolclass=fair)
    assert [w.filename for w in seen] == [__file__]


def test_no_harm_in_memory(server):
    """A creator, a single connection, a shared cache."""
    creator = server.connect
    engine = create_engine("sqlite://?plugin=fairpool", creator=creator)
    assert type(engine.pool) is FairQueuePool
    create_engine("sqlite://", poolclass=FairQueuePool, creator=creator)
    create_engine("sqlite://", poolclass=FairQueuePool, pool_size=1)
    url = "sqlite:///file:plugin?mode=memory&cache=shared&uri=true"
    engine = create_engine(f"{url}&plugin=fairpool")
    assert type(engine.pool) is FairQueuePool
    with engine.begin() as one, engine.connect() as two:
        one.execute(text("create table t (x int)"))
        assert two.execute(text("select 1")).scalar() == 1
    with engine.connect() as other:
        assert other.execute(text("select count(*) from t")).scalar() == 0
    engine.dispose()


OTHERS = {
    "on_other_terms": "lead",
    "tag_option": "tenant",
    "default_tag": "a",
    "ledger": "/a",
    "max_limit": "18",
}
OTHERS["tags"] = '{"api": {"weight": 3}}'


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_the_pool_has_a_key(name):
    driver = "postgresql+psycopg2" if name == "server_tag" else "sqlite"
    for given in [OTHERS.get(name, "1")] + ["None"] * bool(OPTIONS[name].none):
        url = make_url(FILE).set(drivername=driver)
        engine = create_engine(url.update_query_dict({f"fairpool_{name}": given}))
        value = None if given == "None" else given
        expected = getattr(PoolOptions.parse(**{name: value}), name)
        assert getattr(engine.pool.options, name) == expected
        assert given != "None" or expected is None


REPLACED = [
    # The application's overflow would come on top of the size in the URL.
    (
        "pool_size=8",
        {"pool_size": 5, "max_overflow": 10},
        "fairpool_pool_size=8, fairpool_max_overflow=0 in place of the application's "
        "pool_size=5, max_overflow=10",
    ),
    (
        "timeout=1",
        {"pool_timeout": 2},
        "fairpool_timeout=1 in place of the application's pool_timeout=2",
    ),
    (
        "scraper=url",
        {"execution_options": {"scraper": "argument"}},
        "fairpool_scraper='url' in place of the application's scraper='argument'",
    ),
    (
        "ledger=/one.ledger",
        {"ledger": "postgresql://u:secret@h/d"},
        "fairpool_ledger=/one.ledger in place of the application's "
        "ledger='postgresql://u:***@h/d'",
    ),
]


@pytest.mark.parametrize(("key", "given", "text"), REPLACED)
def test_keys_win_over_keyword_arguments_with_one_warning(key, given, text):
    with pytest.warns(SAWarning) as caught:
        engine = made(f"&{key}", **given)
    (warning,) = caught
    assert str(warning.message) == f"the database URL sets {text}"
    assert warning.filename == __file__
    options = engine.pool.options
    assert (options.capacity, options.timeout, options.ledger) == {
        "pool_size=8": (8, 30.0, None),
        "timeout=1": (20, 1.0, None),
        "scraper=url": (20, 30.0, None),
        "ledger=/one.ledger": (20, 30.0, "/one.ledger"),
    }[key]


def test_arguments_that_agree_with_the_keys_or_have_none_are_silent(
    server, monkeypatch
):
    options = {"logging_token": "x"}
    more = {"pool_size": "5", "soft_limit": 2, "execution_options": options}
    engine = made("&scraper=a&pool_size=5", **more)
    assert engine.pool.options.soft_limit == 2
    assert options == {"logging_token": "x"}  # the caller's own dictionary
    assert engine.get_execution_options() == {"scraper": "a", "logging_token": "x"}
    # The tag goes under the option that the pool reads.
    engine = made("&tag_option=tenant&scraper=a&default_tag=b")
    assert engine.get_execution_options() == {"tenant": "a"}
    assert engine.pool.options.default_tag == "b"
    for poolclass in (NullPool, QueuePool):
        engine = made("&soft_limit=8", poolclass=poolclass)
        assert (type(engine.pool), engine.url.query) == (poolclass, {})
        pool = poolclass(server.connect)
        assert made("&soft_limit=8", pool=pool).pool is pool


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("&softlimit=8", "unknown key 'fairpool_softlimit' in the database URL"),
        ("&x=8", "the known ones are fairpool_scraper, fairpool_pool_size, "),
        ("&soft_limit=x", "fairpool_soft_limit='x' is not allowed: a whole"),
        ("&soft_limit=19", "fairpool_soft_limit='19' is not allowed: .* 15"),
        ("&pool_size=0", "fairpool_pool_size='0' is not allowed"),
        ("&timeout=-1", "fairpool_timeout='-1' is not allowed: seconds"),
        ("&pre_ping=maybe", "fairpool_pre_ping='maybe' is not allowed: true"),
        ("&recycle=1h", "fairpool_recycle='1h' is not allowed: a whole .* -1 for ne"),
        ("&scraper=a%0A", r"fairpool_scraper=.a\\n. is not allowed: a tag is"),
        (
            '&tags={"a":{"lock_timeout":0}}',
            r"^fairpool_tags=.*: 0.*lock_timeout is sec",
        ),
        ("&min_idle=1&min_idle=2", "key 'fairpool_min_idle' stands tw"),
    ],
)
def test_bad_key_is_named(keys, message):
    url = "postgresql+psycopg2://app:s3cret@localhost/app?plugin=fairpool"
    with pytest.raises(ArgumentError, match=message) as caught:
        made(keys, url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("start", [create_engine, DynamicConnectionManager().startup])
def test_the_time_out_is_called_as_create_engine_calls_it(start):
    with pytest.raises(ArgumentError, match=r"^pool_timeout='abc' is not allowed"):
        start(f"{FILE}&fairpool_pool_size=5", pool_timeout="abc")
    with pytest.raises(ArgumentError, match=r"^timeout=3 .* name is pool_timeout"):
        start(f"{FILE}&fairpool_pool_size=5", timeout=3)
    with pytest.raises(ArgumentError, match=r"^pool_timeout='abc' is not allowed"):
        create_engine("sqlite:///x", poolclass=FairQueuePool, pool_timeout="abc")


def test_bad_argument_is_not_taken_for_a_key():
    with pytest.raises(ArgumentError, match=r"^soft_limit=99 is not allowed"):
        made("&pool_size=5", soft_limit=99)
