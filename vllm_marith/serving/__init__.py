"""What a server adds to the engine: presets as models, routes, metrics, the page."""
