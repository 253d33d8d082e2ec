"""Git over ssh: the user's ssh config and known hosts mean what they mean to OpenSSH's client."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gitplace import Place, place
from tests.gitservers import USER, Repository, SshServer, keygen, open_directory, sshd

from flowagent.errors import BackendError
from flowagent.settings import Ssh


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with open_directory() as path:
        Repository.make(path / "repos", "one", flow="1")
        yield path


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[SshServer]:
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


def configure(client: Path, server: SshServer, *lines: str, name: str = "work") -> None:
    """Add a host to the config of a client."""
    own = [f"HostName 127.0.0.1\nPort {server.port}\nUser {USER}", *lines]
    with (client / "config").open("a") as config:
        config.write("\n".join([f"Host {name}", *own, ""]))


def repository(here: Place, server: SshServer, name: str = "work") -> dict[str, object]:
    return here.of(f"{name}:{server.root}/one.git")


def openssh_trusts(client: Path, name: str = "work") -> bool:
    """Whether the real client accepts the host key: git-shell then says that there is no shell."""
    options = [f"UserKnownHostsFile={client}/known_hosts", "GlobalKnownHostsFile=none", "BatchMode=yes"]
    words = [word for option in [*options, "StrictHostKeyChecking=yes"] for word in ("-o", option)]
    command = ["ssh", "-F", client / "config", "-i", client / "id_ed25519", *words, name]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    assert ("Host key verification failed" in said) != ("git" in said.lower()), said
    return "Host key verification failed" not in said


def logins(server: SshServer) -> list[str]:
    """The fingerprints of keys that were let in."""
    log = (server.directory.parent / "sshd" / "log").read_text()
    return re.findall(r"Accepted publickey .* (SHA256:\S+)", log)


def fingerprint(path: Path) -> str:
    return subprocess.check_output(["ssh-keygen", "-lf", path], text=True).split()[1]


@contextmanager
def ssh_agent(socket: Path, *keys: Path) -> Iterator[None]:
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert agent.poll() is None
        env = {**os.environ, "SSH_AUTH_SOCK": str(socket)}
        subprocess.run(["ssh-add", "-q", *keys], env=env, check=True)
        yield
    finally:
        agent.terminate()
        agent.wait()


# -- the name of a host in known hosts -------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["", "forge"])
async def test_the_line_to_add_has_the_name_that_ssh_looks_up(
    alias: str, server: SshServer, client: Path, here: Place
) -> None:
    configure(client, server, *([f"HostKeyAlias {alias}"] if alias else []))
    (client / "known_hosts").write_text("")
    with pytest.raises(BackendError, match="is not known") as caught:
        await here.hold(repository(here, server))
    found = re.search(r"add this line to (\S+): (.*)", str(caught.value))
    assert found is not None
    assert found[1] == str(client / "known_hosts")
    assert found[2].split()[0] == (alias or f"[127.0.0.1]:{server.port}")
    assert not openssh_trusts(client)
    (client / "known_hosts").write_text(found[2] + "\n")
    assert openssh_trusts(client)
    assert await here.read(repository(here, server)) == "1"


async def test_another_key_is_said_by_the_same_name(
    server: SshServer, client: Path, here: Place, tmp_path: Path
) -> None:
    configure(client, server, "HostKeyAlias forge")
    (client / "known_hosts").write_text(f"forge {keygen(tmp_path / 'other')}\n")
    with pytest.raises(BackendError, match=r"forge shows another host key .* by: forge ssh-ed25519 "):
        await here.hold(repository(here, server))


async def test_the_key_of_an_address_is_not_that_of_a_name(
    server: SshServer, client: Path, here: Place
) -> None:
    configure(client, server, "HostKeyAlias forge")
    assert server.known_host in (client / "known_hosts").read_text()
    assert not openssh_trusts(client)
    with pytest.raises(BackendError, match="the host key of forge is not known"):
        await here.hold(repository(here, server))


async def test_a_key_revoked_for_a_port_is_not_trusted_for_the_host(
    server: SshServer, client: Path, here: Place
) -> None:
    configure(client, server)
    (client / "known_hosts").write_text(f"127.0.0.1 {server.host_key}\n")
    assert openssh_trusts(client)
    assert await here.read(repository(here, server)) == "1"
    await here.backend.close()
    (client / "known_hosts").write_text(f"127.0.0.1 {server.host_key}\n@revoked {server.known_host}\n")
    with pytest.raises(BackendError, match="cannot be checked: Host key is revoked"):
        await here.hold(here.of(server.url("other")))
    assert not openssh_trusts(client)


# -- known hosts -----------------------------------------------------------------------------------------

HASH = "AAAAAAAAAAAAAAAAAAAAAAAAAAA="


@pytest.mark.parametrize(
    "line",
    [
        b"nothing",
        b"@revoked",
        b"@unheard-of * KEY",
        b"|2|%s|%s KEY" % (HASH.encode(), HASH.encode()),
        b"* ssh-ed25519 AAAA",
        b"* ssh-ed25519",
        b"* ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBA==",
        b"* \xff\x00 \xc3",
        b",, KEY",
        b"elsewhere, KEY",
    ],
)
async def test_a_line_that_is_none_is_skipped(
    line: bytes, server: SshServer, client: Path, here: Place
) -> None:
    """It is of no host, and the others count; also behind a jump, where no address is known."""
    line = line.replace(b"KEY", server.host_key.encode())
    configure(client, server, "HostKeyAlias jump", name="jump")
    configure(client, server, "HostKeyAlias inner", "ProxyJump jump", name="inner")
    known = f"jump {server.host_key}\n".encode()
    (client / "known_hosts").write_bytes(line + b"\n" + known)
    with pytest.raises(BackendError, match="the host key of inner is not known"):
        await here.hold(repository(here, server, "inner"))
    (client / "known_hosts").write_bytes(line + b"\n" + known.replace(b"jump", b"jump,inner"))
    assert await here.read(repository(here, server, "inner")) == "1"


async def test_a_certificate_is_no_key(server: SshServer, client: Path, here: Place, tmp_path: Path) -> None:
    """Only the authority behind one can be known."""
    home = server.directory.parent / "sshd"
    shutil.copy(home / "host_key.pub", tmp_path / "host.pub")
    sign = ["ssh-keygen", "-q", "-s", home / "host_key", "-I", "host", "-h", tmp_path / "host.pub"]
    subprocess.run(sign, check=True)
    configure(client, server, "HostKeyAlias forge")
    (client / "known_hosts").write_text(f"* {(tmp_path / 'host-cert.pub').read_text()}")
    with pytest.raises(BackendError, match="the host key of forge is not known"):
        await here.hold(repository(here, server))
    assert not openssh_trusts(client)


async def test_a_pinned_line_that_is_none(server: SshServer, client: Path, tmp_path: Path) -> None:
    """It is the agent's own configuration, where nothing is skipped."""
    settings = Ssh(hosts={"127.0.0.1": {"known_hosts": ["nothing"]}})
    async with place(tmp_path / "home", settings, environ={"HOME": str(client.parent)}) as here:
        with pytest.raises(
            BackendError, match=r'known_hosts of \[ssh."127.0.0.1"\] is wrong: .*; correct it'
        ):
            await here.hold(here.of(server.url("one")))


async def test_known_hosts_that_cannot_be_read(server: SshServer, client: Path, here: Place) -> None:
    (client / "known_hosts").unlink()
    (client / "known_hosts").mkdir()
    with pytest.raises(BackendError, match="known_hosts cannot be read: Is a directory"):
        await here.hold(here.of(server.url("one")))


async def test_files_of_known_hosts(server: SshServer, client: Path, here: Place) -> None:
    configure(client, server, "UserKnownHostsFile ~/.ssh/none ~/.ssh/hosts", "GlobalKnownHostsFile none")
    with pytest.raises(BackendError, match=f"is not known.* add this line to {client}/none: "):
        await here.hold(repository(here, server))
    (client / "known_hosts").rename(client / "hosts")
    assert await here.read(repository(here, server)) == "1"


@pytest.mark.parametrize("file", ["none", "/dev/null"])
async def test_no_file_of_known_hosts(file: str, server: SshServer, client: Path, here: Place) -> None:
    """The check stays, and only the files for all users count."""
    configure(
        client, server, f"UserKnownHostsFile {file}", "GlobalKnownHostsFile ~/all", "StrictHostKeyChecking no"
    )
    with pytest.raises(BackendError, match=f"is not known.* add this line to {client.parent}/all: "):
        await here.hold(repository(here, server))
    (client / "known_hosts").rename(client.parent / "all")
    assert await here.read(repository(here, server)) == "1"


async def test_no_file_of_known_hosts_at_all(server: SshServer, client: Path, here: Place) -> None:
    configure(client, server, "UserKnownHostsFile none", "GlobalKnownHostsFile none")
    with pytest.raises(BackendError, match=r'add this line to known_hosts of \[ssh."work"\]: \['):
        await here.hold(repository(here, server))


# -- keys ------------------------------------------------------------------------------------------------


async def test_a_key_that_is_not_there_is_skipped(server: SshServer, client: Path, here: Place) -> None:
    (client / "id_ed25519").rename(client / "work_key")
    subprocess.run(["ssh-keygen", "-q", "-N", "secret", "-f", client / "locked"], check=True)
    configure(
        client, server, *(f"IdentityFile ~/.ssh/{name}" for name in ("none", "locked", "config", "work_key"))
    )
    assert await here.read(repository(here, server)) == "1"


@pytest.mark.parametrize("certificate", ["none", "work-cert.pub"])
async def test_a_certificate_for_a_key(
    certificate: str, server: SshServer, client: Path, here: Place, tmp_path: Path
) -> None:
    """One that is not there is skipped as well."""
    authority = keygen(tmp_path / "authority")
    with (server.directory.parent / "sshd" / "authorized_keys").open("a") as authorized:
        authorized.write(f"cert-authority {authority}\n")
    keygen(client / "work")
    sign = ["ssh-keygen", "-q", "-s", tmp_path / "authority", "-I", "one", "-n", USER, client / "work.pub"]
    subprocess.run(sign, check=True)
    (client / "work").rename(client / "key")  # it is not found beside it
    configure(client, server, f"CertificateFile ~/.ssh/{certificate}", "IdentityFile ~/.ssh/key")
    if certificate == "none":
        with pytest.raises(BackendError, match="the host accepts none of the keys"):
            await here.hold(repository(here, server))
    else:
        assert await here.read(repository(here, server)) == "1"


@pytest.mark.parametrize("only", ["yes", "no"])
async def test_no_key_is_there(
    only: str, server: SshServer, client: Path, here: Place, tmp_path: Path
) -> None:
    """Those that are not named are not used instead."""
    subprocess.run(["ssh-keygen", "-q", "-N", "secret", "-f", client / "locked"], check=True)
    configure(
        client, server, f"IdentitiesOnly {only}", "IdentityFile ~/.ssh/none", "IdentityFile ~/.ssh/locked"
    )
    for file in ("locked", "none"):
        assert (client / file).exists() == (file == "locked")
    with pytest.raises(BackendError, match="access is refused") as caught:
        await here.hold(repository(here, server))
    assert f"no key was found in {client}/none, {client}/locked (Passphrase " in str(caught.value)
    assert "\n" not in str(caught.value)
    with ssh_agent(tmp_path / "agent.sock", client / "id_ed25519"):
        here.environ["SSH_AUTH_SOCK"] = str(tmp_path / "agent.sock")
        if only == "no":
            assert await here.read(repository(here, server)) == "1"
        else:
            with pytest.raises(BackendError, match=f"the ssh agent at {tmp_path}/agent.sock"):
                await here.hold(repository(here, server))


async def test_no_identity_file_and_no_agent(server: SshServer, client: Path, here: Place) -> None:
    configure(client, server, "IdentityFile none", "IdentityAgent none")
    with pytest.raises(BackendError, match="no key was found in no file and no ssh agent"):
        await here.hold(repository(here, server))


@pytest.mark.parametrize("public", [False, True])
async def test_the_key_that_is_named_comes_before_others_of_an_agent(
    public: bool, server: SshServer, client: Path, here: Place, tmp_path: Path
) -> None:
    """A forge takes one for whom the first key belongs to. ``public``: only the agent has the other half."""
    name = "work.pub" if public else "work"
    key = keygen(client / name.removesuffix(".pub"))
    with (server.directory.parent / "sshd" / "authorized_keys").open("a") as authorized:
        authorized.write(key + "\n")
    configure(client, server, f"IdentityFile ~/.ssh/{name}")
    with ssh_agent(tmp_path / "agent.sock", client / "id_ed25519", client / "work"):
        if public:
            (client / "work").unlink()
        here.environ["SSH_AUTH_SOCK"] = str(tmp_path / "agent.sock")
        assert await here.read(repository(here, server)) == "1"
        assert logins(server)[-1] == fingerprint(client / "work.pub")


@pytest.mark.parametrize("named", ["~/agent.sock", "SSH_AUTH_SOCK", "$OTHER"])
async def test_the_agent_that_is_named(
    named: str, server: SshServer, client: Path, here: Place, tmp_path: Path
) -> None:
    configure(client, server, f"IdentityAgent {named}")
    socket = client.parent / "agent.sock"
    with ssh_agent(socket, client / "id_ed25519"):
        (client / "id_ed25519").unlink()
        here.environ["SSH_AUTH_SOCK"] = str(socket if named == "SSH_AUTH_SOCK" else tmp_path / "none")
        here.environ["OTHER"] = str(socket)
        assert await here.read(repository(here, server)) == "1"


async def test_no_agent(server: SshServer, client: Path, here: Place, tmp_path: Path) -> None:
    configure(client, server, "IdentityAgent none")
    with ssh_agent(tmp_path / "agent.sock", client / "id_ed25519"):
        (client / "id_ed25519").unlink()
        here.environ["SSH_AUTH_SOCK"] = str(tmp_path / "agent.sock")
        with pytest.raises(BackendError, match="access is refused"):
            await here.hold(repository(here, server))


# -- jumps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ssh://{user}@{place}", "ssh://flowagent%2Dgit@{place}/", "{user}@{place}"])
async def test_a_jump_by_its_address(form: str, server: SshServer, client: Path, here: Place) -> None:
    jump = form.format(user=USER, place=f"127.0.0.1:{server.port}")
    configure(client, server, f"ProxyJump {jump}")
    before = len(logins(server))
    assert await here.read(repository(here, server)) == "1"
    assert len(logins(server)) == before + 2


@pytest.mark.parametrize("form", ["first,second", "ssh://first,ssh://second"])
async def test_a_list_of_jumps(form: str, server: SshServer, client: Path, here: Place, root: Path) -> None:
    """Each host leads to the next one only."""
    name = f"list-{len(form)}"
    with sshd(
        root / "repos", root / name / "second" / ".ssh", f"PermitOpen 127.0.0.1:{server.port}"
    ) as second:
        opened = f"PermitOpen 127.0.0.1:{second.port}"
        with sshd(root / "repos", root / name / "first" / ".ssh", opened) as first:
            configure(client, first, f"IdentityFile {first.directory}/id_ed25519", name="first")
            configure(
                client,
                second,
                f"IdentityFile {second.directory}/id_ed25519",
                "ProxyJump wrong",
                name="second",
            )
            configure(client, server, f"ProxyJump {form}")
            with (client / "known_hosts").open("a") as known:
                known.write(f"{first.known_host}\n{second.known_host}\n")
            assert await here.read(repository(here, server)) == "1"
            assert len(logins(first)) == len(logins(second)) == 1


@pytest.mark.parametrize("value", ["first,", "user:pass@first", "ssh://first:port", "::1"])
async def test_a_jump_that_is_none(value: str, server: SshServer, client: Path, here: Place) -> None:
    configure(client, server, f"ProxyJump {value}")
    with pytest.raises(BackendError, match="ProxyJump of the ssh config names no host; write") as caught:
        await here.hold(repository(here, server))
    assert "pass" not in str(caught.value)
