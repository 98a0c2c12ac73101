"""The Hub side: folders that are whole or not there, code that travels with weights, pushes, and the environment.

Import from the files: `manifest` needs only the standard library, `publish` and `errors` huggingface_hub,
`remote_code` transformers.
"""
