"""The streaming experiment's parts, none of which imports Ray: `actors.layer_stream` is the task that puts them together."""
