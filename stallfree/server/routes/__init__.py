"""The routes, in groups. Each declares its inputs and answers; other modules check, translate, answer and handle errors."""
