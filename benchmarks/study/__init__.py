"""Studies: their settings, what they run next, and the loop that runs it.

Imports run one way: toml, presets → spec; execute → lanes → search → spec, record; clusters and estimate stand beside.
"""
