"""The subcommands of ``python -m shike_fast.data``: each module has ``add_arguments(parser)``, ``run(arguments)``."""
