"""Raw logs, catalogues and images to a dataset folder. Only `pipelines` knows Ray."""
