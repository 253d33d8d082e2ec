from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from flowagent.backend import BackendContext
from flowagent.cli.config import masked
from flowagent.errors import SettingsError
from flowagent.settings import Settings, load


def settings(tmp_path: Path, text: str = "", environ: dict[str, str] | None = None, **flags: Any) -> Settings:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(text)
    return load(None, {"FLOWAGENT_HOME": str(home), **(environ or {})}, flags)


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = load(None, {})
    home = tmp_path / ".flowagent"
    assert found == Settings(home=home, store=f"sqlite:///{home}/flowagent.db")
    assert found.store.startswith("sqlite:////")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert found.capacity == max(2, 2 * len(os.sched_getaffinity(0)))
    assert (found.flows_dir, found.secrets_dir) == (home / "flows", home / "secrets")


def test_flags_come_before_the_environment_before_the_file(tmp_path: Path) -> None:
    text = 'store = "sqlite:////file"\n[agent]\nlimit = 3\ngrace = 4\nname = "file"\n'
    environ = {"FLOWAGENT_LIMIT": "5", "FLOWAGENT_NAME": "environment"}
    found = settings(tmp_path, text, environ, name="flag", limit=None)
    assert (found.store, found.grace, found.limit, found.name) == ("sqlite:////file", 4.0, 5, "flag")
    assert found.capacity == 5


def test_every_kind_of_value_from_the_file(tmp_path: Path) -> None:
    found = settings(
        tmp_path,
        '[agent]\nlabels = ["b", "a,c"]\nhostname_label = false\nimport_paths = ["/x", "~/y"]\n'
        'log_format = "JSON"\nlease = 1.5\nenv = {A = "1", B = "x=y"}\n',
    )
    assert found.labels == ("a", "b", "c")
    assert found.hostname_label is False
    assert found.import_paths == (Path("/x"), Path("~/y").expanduser())
    assert (found.log_format, found.lease, found.env) == ("json", 1.5, {"A": "1", "B": "x=y"})


def test_every_kind_of_value_from_the_environment(tmp_path: Path) -> None:
    found = settings(
        tmp_path,
        environ={
            "FLOWAGENT_LABELS": "a, b",
            "FLOWAGENT_REQUIRE_LABELS": "Yes",
            "FLOWAGENT_ENV": "A=1,B=x=y",
            "FLOWAGENT_IMPORT_PATHS": "/x:/y",
            "FLOWAGENT_POLL": "0.5",
            "FLOWAGENT_SECRET_LABELS": "not a setting",
            "FLOWAGENT_RUN_ID": "not a setting either",
        },
    )
    assert (found.labels, found.require_labels, found.poll) == (("a", "b"), True, 0.5)
    assert (found.env, found.import_paths) == ({"A": "1", "B": "x=y"}, (Path("/x"), Path("/y")))


@pytest.mark.parametrize(
    ("text", "environ", "flags", "message"),
    [
        ("[agent]\nlable = []", {}, {}, r"key agent.lable is unknown; did you mean agent.label"),
        ("labels = []", {}, {}, r"key labels is unknown; did you mean agent.labels"),
        ("[agent]\nstore = 'x'", {}, {}, r"key agent.store is unknown; store belongs at the top of the file"),
        ("[agent]\ncache = '/x'", {}, {}, r"key agent.cache is unknown; cache belongs at the top"),
        ('"a\\nb.memory" = 1', {}, {}, r"key 'a\\nb.memory' is unknown; did you mean max = { memory"),
        ("[agnet]\nlimit = 3", {}, {}, r"key agnet is unknown; did you mean \[agent\]\?"),
        ("[sssh.h]\nkey = '/k'", {}, {}, r"key sssh is unknown; did you mean \[ssh\]\?"),
        (
            "[agent]\nmemory = '2G'",
            {},
            {},
            r"agent.memory is unknown; did you mean max = { memory = … } below",
        ),
        ("output = '2G'", {}, {}, r"key output is unknown; did you mean max = { output = … } below"),
        (
            "[agent]\nmax = {mem = '2G'}",
            {},
            {},
            r"agent.max: there is no limit 'mem'; did you mean memory\?$",
        ),
        ("", {}, {"max": ["mem=2G"]}, r"^option max: there is no limit 'mem'; did you mean memory\?$"),
        ("", {}, {"max": ["qqqq=2G"]}, r"option max: there is no limit 'qqqq'; there are cpu_time, disk,"),
        ('[agent]\n"la\\nbels" = 1', {}, {}, r"key 'agent.la\\nbels' is unknown; did you mean agent.labels"),
        ('[agent]\nmax = {"a\\nb" = 1}', {}, {}, r"there is no limit 'a\\nb'"),
        ('[ssh."a\\nb"]\nkey = 1', {}, {}, r"in \[ssh.\"a b\"\] key or key_secret"),
        ("", {"FLOWAGENT_LABELS\n": "x"}, {}, r"variable 'FLOWAGENT_LABELS\\n' is unknown"),
        ("qqqq = 1", {}, {}, r"key qqqq is unknown; known are home, store, cache, ssh, agent.name"),
        ("agent = 1", {}, {}, r"a table \[agent\] is expected"),
        ("x = ]\ny = 1", {}, {}, r"config.toml is not valid TOML: .*line 1"),
        (f"x = {'[' * 5000}", {}, {}, r"config.toml is not valid TOML: .*recursion"),
        ("[agent]\nlimit = '3x'", {}, {}, r"agent.limit has the value '3x', and a whole number"),
        ("[agent]\nlimit = 0", {}, {}, r"agent.limit has the value 0, and"),
        ("[agent]\nlimit = true", {}, {}, r"agent.limit has the value True, and"),
        ("[agent]\nlabels = 3", {}, {}, r"agent.labels has the value 3, and a list of strings"),
        ("[agent]\nlabels = ['a b']", {}, {}, r"agent.labels: label 'a b' has white space"),
        ("[agent]\nenv = {A = 1}", {}, {}, r"agent.env has a value that cannot be, and a table of strings"),
        ("[agent]\nlease = 'soon'", {}, {}, r"a number of seconds above 0 is expected"),
        ("[agent]\nlease = nan", {}, {}, r"a number of seconds above 0 is expected"),
        ("[agent]\nhostname_label = 'maybe'", {}, {}, r"true or false is expected"),
        ("", {"FLOWAGENT_LOG_FORMAT": "xml"}, {}, r"FLOWAGENT_LOG_FORMAT .*'xml', and one of auto, console"),
        ("", {"FLOWAGENT_LABLES": "a"}, {}, r"FLOWAGENT_LABLES is unknown; did you mean FLOWAGENT_LABELS"),
        ("", {"FLOWAGENT_ENV": "A"}, {}, r"FLOWAGENT_ENV has a value that cannot be, and .*KEY=VALUE"),
        ("[agent]\nhealth_address = '8080'", {}, {}, r"'8080', and HOST:PORT, or the absolute path"),
        ("[agent]\nhealth_address = '::1:80'", {}, {}, r"HOST:PORT"),
        ("[agent]\nhealth_address = 'h:99999'", {}, {}, r"HOST:PORT"),
        ("[agent]\nreserve = '1 lot'", {}, {}, r"a number of bytes such as 512M or 8G is expected"),
        ("[agent]\ncache_max_age = 'long'", {}, {}, r"a number of seconds above 0, or none is expected"),
        ("[agent]\nnotify = 'ftp://x'", {}, {}, r"an http:// or https:// URL without user"),
        (
            "[agent]\ntoken_hosts = ['https://x']",
            {},
            {},
            r"a list of HOST or HOST:PORT, without https://, is",
        ),
        ("", {"FLOWAGENT_TOKEN_HOSTS": "a/b"}, {}, r"a list of HOST or HOST:PORT"),
        ("[agent]\nnotify_key = 'a-b'", {}, {}, r"the name of a secret is expected"),
        ("", {}, {"limit": -1}, r"option limit has the value -1"),
        ("", {}, {"lmit": 1}, r"option lmit is unknown; did you mean limit"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_expected(
    tmp_path: Path, text: str, environ: dict[str, str], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        settings(tmp_path, text, environ, **flags)
    assert "\n" not in str(caught.value)


def test_the_cache_has_limits_that_can_be_taken_away(tmp_path: Path) -> None:
    found = settings(tmp_path, "")
    assert (found.cache_max_size, found.cache_max_age) == (None, 30 * 86400.0)
    found = settings(tmp_path, "[agent]\ncache_max_size = '2G'\ncache_max_age = 3600")
    assert (found.cache_max_size, found.cache_max_age) == (2 << 30, 3600.0)
    found = settings(tmp_path, "[agent]\ncache_max_size = '2G'", {"FLOWAGENT_CACHE_MAX_AGE": "none"})
    assert (found.cache_max_size, found.cache_max_age) == (2 << 30, None)
    assert settings(tmp_path, "[agent]\ncache_max_size = 5", cache_max_size="None").cache_max_size is None


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml does not exist; check --config"):
        load(tmp_path / "nowhere.toml", {"FLOWAGENT_HOME": str(tmp_path)})


def test_a_named_file_may_set_the_home(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f'home = "{tmp_path}/other"')
    assert load(tmp_path / "c.toml", {}).home == tmp_path / "other"
    assert load(tmp_path / "c.toml", {"FLOWAGENT_HOME": f"{tmp_path}/third"}).home == tmp_path / "third"


def test_a_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be created: Not a directory; set FLOWAGENT_HOME"):
        load(None, {"FLOWAGENT_HOME": str(tmp_path / "file" / "home")})


def test_a_variable_may_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[agent]\nlimit = 7")
    environ = {"FLOWAGENT_HOME": f"{tmp_path}/home", "FLOWAGENT_CONFIG": f"{tmp_path}/c.toml"}
    assert load(None, environ).limit == 7
    (tmp_path / "d.toml").write_text("[agent]\nlimit = 8")
    assert load(tmp_path / "d.toml", environ).limit == 8
    environ["FLOWAGENT_CONFIG"] += "x"
    with pytest.raises(SettingsError, match=r"c\.tomlx does not exist"):
        load(None, environ)


def test_each_setting_knows_where_it_was_set(tmp_path: Path) -> None:
    text = "[agent]\nlimit = 3\ngrace = 4\npoll = 2"
    found = settings(tmp_path, text, {"FLOWAGENT_LIMIT": "5", "FLOWAGENT_POLL": "1"}, poll=3)
    file = f"file {tmp_path}/home/config.toml"
    assert found.origins == {
        "home": "variable FLOWAGENT_HOME",
        "limit": "variable FLOWAGENT_LIMIT",
        "grace": file,
        "poll": "option --poll",
    }


def test_values_that_may_be_secret_are_not_repeated(tmp_path: Path) -> None:
    for key, value in {
        "notify": "https://u:hunter2@example.com/x",
        "env": "hunter2",
        "store": ["hunter2"],
        "engine": ["tcp://u:hunter2@h"],
        "registry_allow": ["https://u:hunter2@h", 1],
    }.items():
        with pytest.raises(SettingsError, match="expected") as caught:
            settings(tmp_path, **{key: value})
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "mysql://u:hunter2@h/d",
            "http://u:hunter2@h",
            "postgresql:u:hunter2",
            "hunter2",
            "sqlite:/hunter2",
        ),
        *(
            "sqlite://hunter2",
            "sqlite:///",
            "sqlite:///:memory:",
            "sqlite:///a\0hunter2",
            "host=h password=x",
        ),
    ],
)
def test_what_is_no_url_of_a_store_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    expected = r"has a value that cannot be, and sqlite:////absolute/path or postgresql://.* is expected"
    with pytest.raises(SettingsError, match=expected) as caught:
        settings(tmp_path, store=url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["sqlite:////a/b.db", "SQLite:///b", "postgresql://", "postgres://h1:1,h2:2/d"]
)
def test_what_may_be_one_is_not(tmp_path: Path, url: str) -> None:
    assert settings(tmp_path, store=url).store == url


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:80", "localhost:8080", "/run/x.sock", "unix:/x"])
def test_addresses(tmp_path: Path, address: str) -> None:
    assert settings(tmp_path, health_address=address).health_address == address.removeprefix("unix:")


def test_hosts_that_get_tokens(tmp_path: Path) -> None:
    assert settings(tmp_path).token_hosts == ()
    found = settings(tmp_path, '[agent]\ntoken_hosts = ["Git.Example", "git.example:8443", "[::1]:80"]')
    assert found.token_hosts == ("git.example", "git.example:8443", "[::1]:80")
    assert settings(tmp_path, environ={"FLOWAGENT_TOKEN_HOSTS": "a, b:1"}).token_hosts == ("a", "b:1")
    assert BackendContext.of(found).token_hosts == found.token_hosts


def test_sources_may_be_kept_elsewhere(tmp_path: Path) -> None:
    assert settings(tmp_path).sources_dir == tmp_path / "home" / "sources"
    assert settings(tmp_path, f'cache = "{tmp_path}/c"').sources_dir == tmp_path / "c" / "sources"


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        (
            "store",
            "postgresql://u:hunter2@h/d?sslpassword=hunter2&x=1",
            "postgresql://u:***@h/d?sslpassword=***&x=1",
        ),
        ("store", "postgresql://u:p@ss:hunter2@h/d", "postgresql://u:***@h/d"),
        ("store", "postgresql://u@h:5432/d", "postgresql://u@h:5432/d"),
        ("store", "sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("notify", "https://hooks.example.com/services/T1/hunter2", "https://hooks.example.com/***"),
        (
            "env",
            {"API_TOKEN": "hunter2", "A": "http://u:hunter2@h", "B": "1"},
            {"API_TOKEN": "***", "A": "http://***@h", "B": "1"},
        ),
        ("store", "postgresql://u:hun/ter2@h/d", "postgresql://u:***@h/d"),
        ("store", "postgresql://[::1]:5432/d@e", "postgresql://[::1]:5432/d@e"),
        ("store", "host=h password='hunter 2' user=u", "host=h password=*** user=u"),
        ("env", {"A": "https://hunter2@h/x http://u:hunter2@h"}, {"A": "https://***@h/x http://***@h"}),
        ("env", {"A": "ssh://git@h/x"}, {"A": "ssh://git@h/x"}),
        ("env", {"A": "http://h:80/x@1?token=hunter2"}, {"A": "http://h:80/x@1?token=***"}),
        ("store", "postgresql://h/d?pass%77ord=hunter2&x=1", "postgresql://h/d?pass%77ord=***&x=1"),
        ("engine", "tcp://u:hunter2@h:2375", "tcp://u:***@h:2375"),
        ("registry_allow", ("https://u:hunter2@reg/x", "reg:5000/y"), ["https://***@reg/x", "reg:5000/y"]),
        ("env", {"HDR": "Authorization: Bearer hunter2"}, {"HDR": "Authorization: ***"}),
        ("env", {"HDR": "curl -H 'X-Api-Key: hunter2' x"}, {"HDR": "curl -H 'X-Api-Key: ***' x"}),
        ("env", {"HDR": "Bearer hunter2, more"}, {"HDR": "Bearer ***, more"}),
        ("env", {"J": '{"password": "hunter2", "a": [1]}'}, {"J": '{"password": "***", "a": [1]}'}),
        ("env", {"J": '[{"auths": {"x": {"y": "hunter2"}}}]'}, {"J": '[{"auths": "***"}]'}),
        ("env", {"J": """x={'password': 'hun"ter2', 'a': 1}"""}, {"J": "x={'password': ***, 'a': 1}"}),
        ("env", {"J": 'x "{\\"password\\": \\"hunter2\\"}"'}, {"J": 'x "{\\"password\\": ***}"'}),
        ("env", {"SAS": "https://h/c?sv=1&sig=hunter2&se=2"}, {"SAS": "https://h/c?sv=1&sig=***&se=2"}),
        ("env", {"A": "x=1 y=token=hunter2 password = hunter2"}, {"A": "x=1 y=token=*** password = ***"}),
        ("env", {"A": 'design=1 PGPASSWORD="hunter 2"'}, {"A": "design=1 PGPASSWORD=***"}),
        ("env", {"A": "'secret' = 'hunter2' b"}, {"A": "'secret' = *** b"}),
        ("env", {"HDR": "Cookie: session=hunter2"}, {"HDR": "Cookie: ***"}),
        ("token_hosts", ("auth.example.com:8443",), ["auth.example.com:8443"]),
        ("volumes", ("/etc/keys:/keys:ro",), ["/etc/keys:/keys:ro"]),
        ("notify_key", "HOOK_KEY", "HOOK_KEY"),
        ("ssh", {"h": {"key": "/k", "known_hosts": ["h x"]}}, {"h": {"key": "/k", "known_hosts": ["h x"]}}),
        ("max", {"memory": 5, "disk": None}, {"memory": 5, "disk": None}),
        ("labels", ("a", "b"), ["a", "b"]),
        ("limit", 3, 3),
    ],
)
def test_secrets_are_masked(key: str, value: Any, shown: Any) -> None:
    assert masked(key, value) == shown


def test_long_texts_are_masked_in_no_time() -> None:
    for text in ("a=" * 50_000, "x" * 100_000, '{"a' * 30_000, "a:b@" * 30_000, "key: " * 20_000):
        masked("image", text)
