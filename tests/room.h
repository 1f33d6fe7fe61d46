/* room.h - a temporary directory of a test's own: made by room_make, emptied and removed by room_remove
 *
 * For tests of POSIX systems; define _GNU_SOURCE before the first include, mkdtemp wants it. */
#ifndef MFT_TEST_ROOM_H
#define MFT_TEST_ROOM_H

#include "test.h"

#include <dirent.h>
#include <unistd.h>

static char room[300];

/* 0, with a word about it, if there is no place for temporary files. */
static int room_make(const char *suite)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(room, sizeof room, "%.200s/mft-test-%.40s-XXXXXX", tmp && *tmp ? tmp : "/tmp", suite);
    if (mkdtemp(room)) return 1;
    printf("no temporary directory\n");
    return 0;
}

/* The path of a name in it: one of eight rotating buffers. */
static const char *in_room(const char *name)
{
    static char buffers[8][700];
    static int  next;
    char       *b = buffers[next++ % 8];
    snprintf(b, sizeof buffers[0], "%s/%s", room, name);
    return b;
}

static void remove_dir(const char *dir)
{
    DIR           *d = opendir(dir);
    struct dirent *e;
    char           path[1200];
    while (d && (e = readdir(d)) != NULL) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        if (unlink(path) != 0) remove_dir(path);
    }
    if (d) closedir(d);
    rmdir(dir);
}

/* Names in a directory that hold a word; "" for all of them. */
TEST__UNUSED static int count_files(const char *dir, const char *word)
{
    DIR           *d = opendir(dir);
    struct dirent *e;
    int            n = 0;
    while (d && (e = readdir(d)) != NULL) n += strcmp(e->d_name, ".") && strcmp(e->d_name, "..") && strstr(e->d_name, word);
    if (d) closedir(d);
    return n;
}

TEST__UNUSED static void write_file(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    CHECK_MSG(f && fwrite(data, 1, bytes, f) == bytes, "%s", path);
    if (f) fclose(f);
}

/* Resident bytes of all mappings of files of that name, with such rights; -1 where the system does not say. */
TEST__UNUSED static int64_t resident_of(const char *name, const char *rights)
{
    FILE   *f = fopen("/proc/self/smaps", "r");
    char    line[1000];
    int     inside = 0;
    int64_t bytes = 0, kb;
    if (!f) return -1;
    while (fgets(line, sizeof line, f)) {
        if (strchr(line, '-') && line[0] != 'R' && strchr(line, ':') && strstr(line, rights)) inside = strstr(line, name) != NULL;
        else if (strchr(line, '-') && strstr(line, "p ") && line[0] != 'R') inside = 0;
        if (inside && !strncmp(line, "Rss:", 4)) { kb = strtoll(line + 4, NULL, 10); bytes += kb * 1024; }
    }
    fclose(f);
    return bytes;
}

#endif
