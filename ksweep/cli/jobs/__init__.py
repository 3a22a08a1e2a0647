"""Jobs for people: found by a short name, listed, watched, explained, ended. All from files; nothing needs their launcher."""
