"""An HTTP server that speaks OpenAI's chat protocol about videos and images."""
