"""Git over ssh without an ssh client: keys, known hosts, configuration, jumps, and servers of both kinds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import asyncssh
import pytest
from gitplace import Place, place
from tests.gitservers import USER, Repository, SshServer, keygen, open_directory, sshd

from flowagent.errors import BackendError, SecretError, StorageTransientError
from flowagent.settings import Ssh
from flowagent.storage import Git


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with open_directory() as path:
        yield path


@pytest.fixture(scope="module")
def repository(root: Path) -> Repository:
    return Repository.make(root / "repos", "one", flow="1")


@pytest.fixture(scope="module")
def server(root: Path, repository: Repository) -> Iterator[SshServer]:
    with sshd(root / "repos", root / "client" / ".ssh") as started:
        yield started


@pytest.fixture
def client(server: SshServer, tmp_path: Path) -> Path:
    """A ~/.ssh of this test's own."""
    shutil.copytree(server.directory, tmp_path / "user" / ".ssh")
    return tmp_path / "user" / ".ssh"


@pytest.fixture
async def here(client: Path, tmp_path: Path) -> AsyncIterator[Place]:
    async with place(tmp_path / "home", environ={"HOME": str(client.parent)}) as made:
        yield made


# -- host keys -------------------------------------------------------------------------------------------


async def test_an_unknown_host_is_said_with_the_line_to_add(
    server: SshServer, client: Path, here: Place
) -> None:
    (client / "known_hosts").write_text("")
    storage = here.of(server.url("one"))
    with pytest.raises(BackendError, match=r"the host key of .* is not known: SHA256:") as caught:
        await here.hold(storage)
    fingerprint = subprocess.run(
        ["ssh-keygen", "-lf", "-"], input=server.host_key.encode(), capture_output=True, check=True
    ).stdout.split()[1]
    assert fingerprint.decode() in str(caught.value)
    found = re.search(r"add this line to (\S+): (.*)", str(caught.value))
    assert found is not None
    Path(found[1]).write_text(found[2] + "\n")
    assert await here.read(storage) == "1"


async def test_a_host_with_another_key_is_not_trusted(
    server: SshServer, client: Path, here: Place, tmp_path: Path
) -> None:
    other = keygen(tmp_path / "other")
    (client / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {other}\n")
    with pytest.raises(
        BackendError, match=r"another host key than the known one: SHA256:.*somebody may be in between"
    ):
        await here.hold(here.of(server.url("one")))


async def test_a_configuration_cannot_switch_the_check_off(
    server: SshServer, client: Path, here: Place
) -> None:
    (client / "known_hosts").write_text("")
    (client / "config").write_text("Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n")
    with pytest.raises(BackendError, match="is not known"):
        await here.hold(here.of(server.url("one")))


async def test_a_host_key_can_be_pinned_in_the_configuration(
    server: SshServer, client: Path, tmp_path: Path
) -> None:
    (client / "known_hosts").unlink()
    hosts = {"127.0.0.1": {"known_hosts": [server.known_host]}}
    async with place(tmp_path / "home", Ssh(hosts=hosts), environ={"HOME": str(client.parent)}) as here:
        assert await here.read(here.of(server.url("one"))) == "1"


async def test_hashed_known_hosts_are_read(server: SshServer, client: Path, here: Place) -> None:
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", client / "known_hosts"], check=True, capture_output=True)
    assert "127.0.0.1" not in (client / "known_hosts").read_text()
    assert await here.read(here.of(server.url("one"))) == "1"


# -- keys ------------------------------------------------------------------------------------------------


async def test_a_key_that_is_not_accepted(server: SshServer, client: Path, here: Place) -> None:
    (client / "id_ed25519").unlink()
    keygen(client / "id_rsa", "rsa")
    with pytest.raises(BackendError, match=r"access is refused .*the key that the agent uses"):
        await here.hold(here.of(server.url("one")))


async def test_no_key_at_all(server: SshServer, client: Path, here: Place) -> None:
    (client / "id_ed25519").unlink()
    with pytest.raises(BackendError, match="access is refused"):
        await here.hold(here.of(server.url("one")))


async def test_a_directory_of_keys_of_its_own(server: SshServer, client: Path, tmp_path: Path) -> None:
    elsewhere = client.rename(tmp_path / "keys")
    async with place(tmp_path / "home", Ssh(elsewhere), environ={"HOME": str(tmp_path / "none")}) as here:
        assert await here.read(here.of(server.url("one"))) == "1"


@pytest.mark.parametrize("kind", ["key", "key_secret"])
async def test_a_deploy_key_for_one_repository(
    kind: str, server: SshServer, client: Path, tmp_path: Path
) -> None:
    key = (client / "id_ed25519").rename(tmp_path / "deploy")
    path = f"127.0.0.1{server.root}/one"
    value = str(key) if kind == "key" else "DEPLOY_KEY"
    environ = {"HOME": str(client.parent), "FLOWAGENT_SECRET_DEPLOY_KEY": key.read_text()}
    async with place(tmp_path / "home", Ssh(hosts={path: {kind: value}}), environ=environ) as here:
        assert await here.read(here.of(server.url("one"))) == "1"
        with pytest.raises(BackendError, match="access is refused"):
            await here.hold(here.of(server.url("other")))


async def test_a_deploy_key_that_is_not_there(server: SshServer, client: Path, tmp_path: Path) -> None:
    for rule, said in (
        ({"key": "/nowhere"}, "cannot be read: No such file"),
        ({"key_secret": "NONE"}, "NONE is not set"),
    ):
        hosts = {"127.0.0.1": rule}
        async with place(tmp_path / "home", Ssh(hosts=hosts), environ={"HOME": str(client.parent)}) as here:
            with pytest.raises((BackendError, SecretError), match=said):
                await here.hold(here.of(server.url("one")))


async def test_keys_of_an_agent(server: SshServer, client: Path, tmp_path: Path) -> None:
    socket = tmp_path / "agent.sock"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert agent.poll() is None
        env = {**os.environ, "SSH_AUTH_SOCK": str(socket)}
        subprocess.run(["ssh-add", "-q", client / "id_ed25519"], env=env, check=True)
        (client / "id_ed25519").unlink()
        environ = {"HOME": str(client.parent), "SSH_AUTH_SOCK": str(socket)}
        async with place(tmp_path / "home", environ=environ) as here:
            assert await here.read(here.of(server.url("one"))) == "1"
    finally:
        agent.terminate()
        agent.wait()


# -- configuration ---------------------------------------------------------------------------------------


async def test_a_host_of_the_configuration(server: SshServer, client: Path, here: Place) -> None:
    (client / "id_ed25519").rename(client / "work_key")
    (client / "config").write_text(
        f"Host work\n  HostName 127.0.0.1\n  Port {server.port}\n  User {USER}\n"
        f"  IdentityFile {client}/work_key\n"
    )
    assert await here.read(here.of(f"work:{server.root}/one.git")) == "1"


async def test_through_another_host(server: SshServer, client: Path, here: Place) -> None:
    (client / "config").write_text(
        f"Host jump\n  HostName 127.0.0.1\n  Port {server.port}\n  User {USER}\n"
        f"Host inner\n  HostName 127.0.0.1\n  Port {server.port}\n  User {USER}\n  ProxyJump jump\n"
    )
    log = server.directory.parent / "sshd" / "log"
    before = log.read_text().count("Accepted publickey")
    assert await here.read(here.of(f"inner:{server.root}/one.git")) == "1"
    assert await here.read(here.of(f"jump:{server.root}/one.git")) == "1"  # through that which is open
    assert log.read_text().count("Accepted publickey") == before + 2


async def test_hosts_that_lead_through_each_other(server: SshServer, client: Path, here: Place) -> None:
    (client / "config").write_text("Host one\n  ProxyJump two\nHost two\n  ProxyJump one\n")
    with pytest.raises(BackendError, match="leads through too many hosts"):
        await here.hold(here.of(f"one:{server.root}/one.git"))


async def test_the_short_form_of_a_declaration(
    server: SshServer, root: Path, client: Path, here: Place
) -> None:
    """``git@host:org/repo.git`` and ``repo_host`` with a port, as use_ssh makes them."""
    (client / "config").write_text(f"Host forge\n  HostName 127.0.0.1\n  Port {server.port}\n  User {USER}\n")
    where = str(server.root / "one").strip("/")
    by_port = Git("flow.py", where, f"127.0.0.1:{server.port}", use_ssh=True).to_json()
    by_name = Git("flow.py", "org/one", "forge", use_ssh=True).to_json()
    for storage in (by_port, by_name):
        with pytest.raises(BackendError, match="access is refused"):  # there is no user git here
            await here.hold(storage)
    log = (server.directory.parent / "sshd" / "log").read_text()
    assert "user git" in log


async def test_a_configuration_that_is_wrong(server: SshServer, client: Path, here: Place) -> None:
    (client / "config").write_text("Host *\n  Port none\n")
    with pytest.raises(BackendError, match="config cannot be used"):
        await here.hold(here.of(f"ssh://{USER}@127.0.0.1{server.root}/one.git"))


async def test_openssh_where_it_is_asked_for(server: SshServer, client: Path, tmp_path: Path) -> None:
    repository = Repository.make(server.root, "two", flow="1")
    settings = Ssh(client, client="openssh", hosts={"127.0.0.1": {"known_hosts": [server.known_host]}})
    (client / "known_hosts").unlink()
    async with place(tmp_path / "home", settings, environ={"HOME": str(client.parent)}) as here:
        assert await here.read(here.of(server.url("two"))) == "1"
        repository.commit(flow="2")
        assert await here.read(here.of(server.url("two"))) == "2"


async def test_no_ssh_client_is_needed(server: SshServer, here: Place, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("git", "sh", "cat"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    here.environ["PATH"] = str(programs)
    assert await here.read(here.of(server.url("one"))) == "1"


# -- connections -----------------------------------------------------------------------------------------


async def test_a_connection_that_was_cut_is_made_again(server: SshServer, root: Path, here: Place) -> None:
    storage = here.of(server.url("one"))
    await here.hold(storage)
    (name,) = here.backend._connections._open
    here.backend._connections._open[name].connection._transport.abort()  # type: ignore[union-attr]
    assert await here.read(storage) == "1"


async def test_a_server_that_takes_few_sessions(root: Path, repository: Repository, tmp_path: Path) -> None:
    with sshd(root / "repos", root / "few" / ".ssh", "MaxSessions 2") as few:
        async with place(tmp_path, environ={"HOME": str(root / "few")}) as made:
            storage = made.of(few.url("one"))
            found: list[str] = []

            async def resolve() -> None:
                found.append((await made.backend.resolve(storage)).id)

            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(resolve)
            assert found == [repository.head] * 20
            log = few.directory.parent / "sshd" / "log"
            assert log.read_text().count("Accepted publickey") == 1


async def test_a_server_that_is_not_openssh(
    root: Path, client: Path, repository: Repository, here: Place
) -> None:
    """An asyncssh server, which lets no environment through: the protocol is an old one."""

    key = asyncssh.generate_private_key("ssh-ed25519")

    async def run(process: asyncssh.SSHServerProcess[bytes]) -> None:
        import asyncio

        assert process.command is not None
        path = process.command.split(" ", 1)[1].strip("'")
        child = await asyncio.create_subprocess_exec(
            "git", "upload-pack", path, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert child.stdin is not None and child.stdout is not None

        async def up() -> None:
            while data := await process.stdin.read(65536):
                child.stdin.write(data)  # type: ignore[union-attr]
            child.stdin.close()  # type: ignore[union-attr]

        task = asyncio.create_task(up())
        while data := await child.stdout.read(65536):
            process.stdout.write(data)
            await process.stdout.drain()
        task.cancel()
        process.exit(await child.wait())

    async with await asyncssh.listen(
        "127.0.0.1",
        0,
        server_host_keys=[key],
        authorized_client_keys=str(client / "id_ed25519.pub"),
        process_factory=run,
        encoding=None,
    ) as listener:
        port = listener.get_port()
        line = f"[127.0.0.1]:{port} {key.export_public_key().decode()}"
        (client / "known_hosts").write_text(line)
        storage = here.of(f"ssh://git@127.0.0.1:{port}{repository.bare}")
        assert await here.read(storage) == "1"


async def test_a_host_that_says_nothing(client: Path, here: Place) -> None:
    import socket

    from flowagent_backends.git import ssh

    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssh, "PATIENCE", 0.5)
        with pytest.raises(StorageTransientError, match="cannot be reached"):
            await here.hold(here.of(f"ssh://git@127.0.0.1:{mute.getsockname()[1]}/x.git"))
