"""What every layer of the package may use: checks, settings, tracing, private names of torch and PEFT."""
