"""Where people and programs keep credentials: what no flow may read unless the operator says so."""

from __future__ import annotations

import os
import pwd

OF_USERS = (
    ".ssh", ".gnupg", ".aws", ".azure", ".boto", ".s3cfg", ".oci", ".kube", ".docker", ".netrc",
    ".git-credentials", ".config/git/credentials", ".config/gcloud", ".config/gh", ".config/glab-cli",
    ".config/hub", ".config/containers", ".config/rclone", ".config/pypoetry", ".config/doctl", ".config/op",
    ".config/sops", ".config/age", ".config/chromium", ".config/google-chrome", ".config/systemd",
    ".mozilla", ".pgpass", ".my.cnf", ".mylogin.cnf", ".pypirc", ".npmrc", ".yarnrc.yml",
    ".cargo/credentials", ".cargo/credentials.toml", ".gem/credentials", ".m2/settings.xml", ".terraform.d",
    ".terraformrc", ".vault-token", ".databrickscfg", ".snowflake", ".snowsql", ".dbt", ".kaggle",
    ".huggingface", ".cache/huggingface/token", ".password-store",
    ".local/share/keyrings", ".prefect", ".flowagent", ".ansible", ".bash_history", ".zsh_history",
    ".python_history", ".psql_history", ".mysql_history", ".viminfo", ".lesshst",
)  # fmt: skip
"""Below the home of the user that the agent runs as."""

OF_THE_SYSTEM = (
    "/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-", "/etc/sudoers", "/etc/sudoers.d",
    "/etc/security/opasswd", "/etc/ssl/private", "/etc/krb5.keytab", "/etc/wireguard", "/etc/openvpn",
    "/etc/NetworkManager/system-connections", "/etc/flowagent", "/etc/kubernetes", "/etc/rancher",
    "/etc/ssh/ssh_host_rsa_key", "/etc/ssh/ssh_host_ecdsa_key", "/etc/ssh/ssh_host_ed25519_key",
    "/run/credentials", "/run/secrets", "/var/run/secrets", "/var/lib/kubelet", "/var/lib/docker",
    "/var/lib/containerd", "/var/lib/private", "/var/spool/cron",
)  # fmt: skip
"""What only root may read is listed as well: the agent may be root."""


def home() -> str:
    """The home of the user that the agent runs as, whatever its environment says."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "/nonexistent"


def places() -> list[str]:
    """All paths, there or not."""
    user = home()
    return [*(os.path.join(user, name) for name in OF_USERS), *OF_THE_SYSTEM]
