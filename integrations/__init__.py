"""
Tables of frameworks' functions and the stages that they are; installed as `gpuscope.integrations`.

Each file here uses gpuscope's public names only, and imports its framework when it is used.
"""
