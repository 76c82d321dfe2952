"""The APIs that clients speak. Each is a file: its bodies, how they become a chat, and how an answer is written."""
