"""The endpoint: wire types, the web application, and its life under Ray Serve."""
