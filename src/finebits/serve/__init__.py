"""Models and adapters that answer over HTTP (engine up to http), and the page of a plan (studio)."""
