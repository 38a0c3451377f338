"""Exporters: the quantized model as artefacts that the runtimes of the field run, one runtime per file."""
