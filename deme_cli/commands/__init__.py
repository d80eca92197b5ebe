"""The command line: one file per subcommand, options -> config -> procedure -> output."""
