"""The two tables that hold the small files of sweeps, and the statements on them.

A line has its number in its file, so that a reader goes on from where it was. An append is one statement: it is there whole or
not at all, and once, however often it is tried. Its lines carry an id by which a second attempt finds the first.
"""

CREATE_TABLES = """
create table if not exists noisy_label_lines (
    sweep text, file text, number bigint, append uuid not null, line text not null, primary key (sweep, file, number)
);
create table if not exists noisy_label_texts (
    sweep text, name text, content text not null, primary key (sweep, name)
)"""
APPEND_LINES = """
insert into noisy_label_lines (sweep, file, number, append, line)
select %(sweep)s::text, %(file)s::text, stored.next + added.place - 1, %(append)s::uuid, added.line
from (select coalesce(max(number) + 1, 0) as next from noisy_label_lines where sweep = %(sweep)s and file = %(file)s) stored,
     unnest(%(lines)s::text[]) with ordinality added (line, place)
where not (%(again)s::boolean and exists (
    select from noisy_label_lines where sweep = %(sweep)s and file = %(file)s and append = %(append)s::uuid))"""
READ_LINES = """
select number, line from noisy_label_lines where sweep = %s and file = %s and number >= %s order by number limit %s"""
READ_TEXT = "select content from noisy_label_texts where sweep = %s and name = %s"
WRITE_TEXT = """
insert into noisy_label_texts values (%s, %s, %s) on conflict (sweep, name) do update set content = excluded.content"""
HOLDERS = """
select 1 from pg_locks join pg_database on pg_database.oid = database
where datname = current_database() and locktype = 'advisory' and objsubid = 1 and granted
and (classid::bigint << 32) | objid::bigint = %s"""
