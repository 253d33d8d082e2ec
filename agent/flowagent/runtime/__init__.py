"""What executes next to user code: launcher, supervisor, flow process, loader, sandbox, events.

Stdlib-only and able to run in any CPython >= 3.9. A copy of this floor is what a launcher imports; see
:mod:`flowagent.ground`.
"""
