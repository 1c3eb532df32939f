"""DeepSeek sparse attention."""
