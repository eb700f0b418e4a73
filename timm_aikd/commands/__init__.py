"""The subcommands of `timm-aikd`."""
