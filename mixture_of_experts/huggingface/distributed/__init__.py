"""Models with experts under the `DistributedConfig` of `transformers`: its meshes and plans, our exchange."""
