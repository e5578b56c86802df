"""Label maps of a video in the formats of other tools: one file a format; `table` names them, `given` reads them."""
