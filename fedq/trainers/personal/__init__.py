"""Jobs whose clients have models of their own."""
