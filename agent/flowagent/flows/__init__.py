"""The authoring API and the engine: stdlib-only, for CPython 3.9 and newer.

Names are imported from their modules, or from the package ``flowagent``.
"""
