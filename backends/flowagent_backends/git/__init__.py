"""Git storage: any repository, any ref, over https and ssh, each commit fetched and checked out once.

remotes.py       where a repository is, from a declaration and secrets
references.py    which ref is asked for; discovery.py and packets.py find the commit it names now
program.py       the git program, made safe; transport.py and ssh.py are its ways to a remote
mirrors.py       what was fetched; checkout.py writes the tree of a commit
"""

from flowagent_backends.git.backend import GitBackend

__all__ = ["GitBackend"]
