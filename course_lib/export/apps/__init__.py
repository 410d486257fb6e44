"""The files of a published app, copied as they are. They run where only transformers and peft are, so they import nothing of this library."""
