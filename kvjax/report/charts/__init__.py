"""Charts: described once, drawn by plotly on a page and by matplotlib for papers."""
