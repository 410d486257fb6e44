"""An agent: a model that calls tools. Its protocol, its tools, and the runner that goes between them."""
