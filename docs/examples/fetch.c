/* A consumer of ghostpool's task socket; the messages are described in docs/task-socket.md.
 *
 *     cc -std=c11 -Wall -Wextra -o fetch fetch.c && ./fetch SOCKET TASK COMMAND [ARGUMENT...]
 *
 * Puts the descriptors of one task at their numbers, waits until all tasks have theirs, and becomes
 * the command. Exit status 1: the restore was undone, or something failed; 2: nothing was begun. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { MESSAGE = 1 << 16, FDS = 253, DEPTH = 16 };
struct file { int number, fd; bool cloexec; char key[48]; }; /* a key, or "" */
struct message { char type[16], why[1024]; bool more, refused; int count; struct file file[FDS]; };
static int people = 2; /* where they read, whatever becomes of number 2 */
#define die(status, ...) (dprintf(people, __VA_ARGS__), dprintf(people, "\n"), exit(status))

static const char *at; /* what is left of the message: JSON, of which some is looked for */

static bool next_is(char c) {
    at += strspn(at, " \t\r\n");
    return *at == c && *at++;
}

static void need(char c) { if (!next_is(c)) die(1, "no JSON: no %c before: %.20s", c, at); }

static void string(char *out, size_t room) { /* up to the closing quote, as much as fits */
    static const char escapes[] = "bfnrtu", meant[] = "\b\f\n\r\t?";
    for (; *at != '"'; at++) {
        char c = *at;
        if (c == '\\' && (c = *++at) && strchr(escapes, c)) {
            c = meant[strchr(escapes, c) - escapes];
            if (*at == 'u') at += strnlen(at + 1, 4); /* in reasons only, and ASCII will do */
        }
        if (!*at) die(1, "no JSON: a string without an end");
        if (room > 1) *out++ = c, room--;
    }
    *out = 0, at++;
}

/* A value inside of `depth` brackets, to which `key` leads; one of `file`, if in a row of those. */
static void value(struct message *m, struct file *file, int depth, const char *key) {
    char inner[16], text[sizeof m->why] = "";
    if (depth == DEPTH) die(1, "the message is nested too deep");
    if (next_is('{') || next_is('[')) {
        char end = at[-1] == '{' ? '}' : ']';
        if (depth == 2 && end == '}' && !strcmp(key, "files")) {
            if (m->count == FDS) die(1, "too many files in one message");
            file = &m->file[m->count++];
        }
        for (bool first = true; !next_is(end); first = false) {
            if (!first) need(',');
            if (end == '}') need('"'), string(inner, sizeof inner), need(':');
            value(m, file, depth + 1, end == '}' ? inner : key);
        }
        return;
    }
    bool quoted = next_is('"');
    size_t length = quoted ? 0 : strspn(at, "+-.0123456789abcdefghijklmnopqrstuvwxyzE");
    if (quoted) string(text, sizeof text);
    else if (!length || length >= sizeof text) die(1, "no JSON: %.20s", at);
    else memcpy(text, at, length), at += length;
    bool yes = !quoted && !strcmp(text, "true"), message = depth == 1, row = depth == 3 && file;
#define IS(name) !strcmp(key, name)
    if (message && IS("type")) memcpy(m->type, text, sizeof m->type - 1);
    if (message && IS("reason")) memcpy(m->why, text, sizeof m->why);
    if (message && (IS("more") || IS("refused"))) *(IS("more") ? &m->more : &m->refused) = yes;
    if (row && IS("fd")) file->number = atoi(text);
    if (row && IS("close_on_exec")) file->cloexec = yes;
    if (row && IS("key")) memcpy(file->key, text, sizeof file->key - 1);
}

static void say(int connection, const char *message) {
    /* If it has closed, what it said before that is still to be received. */
    if (send(connection, message, strlen(message), MSG_NOSIGNAL) < 0 && errno != EPIPE)
        die(1, "send: %s", strerror(errno));
}

static void hear(int connection, struct message *m, const char *expected) {
    static char text[MESSAGE + 1];
    union { struct cmsghdr first; char space[CMSG_SPACE(FDS * sizeof(int))]; } control;
    struct msghdr header = {.msg_iov = &(struct iovec){text, MESSAGE}, .msg_iovlen = 1,
                            .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t length = recvmsg(connection, &header, MSG_CMSG_CLOEXEC);
    if (length <= 0) die(1, "the server is gone: %s", length ? strerror(errno) : "it has closed");
    if (header.msg_flags & MSG_CTRUNC) die(1, "RLIMIT_NOFILE is too low for the descriptors");
    text[length] = 0, at = text, *m = (struct message){0};
    value(m, NULL, 0, "");
    if (!strcmp(m->type, "abort")) die(m->refused ? 2 : 1, "aborted: %s", m->why);
    int count = 0, *fds = (int *)CMSG_DATA(&control.first);
    if (CMSG_FIRSTHDR(&header) && control.first.cmsg_type == SCM_RIGHTS)
        count = (int)((control.first.cmsg_len - CMSG_LEN(0)) / sizeof(int));
    if (strcmp(m->type, expected) || count != m->count) die(1, "not %s: %s", expected, text);
    for (int i = 0; i < count; i++) m->file[i].fd = fds[i];
}

static int above(int fd, int numbers) { /* out of their way */
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, numbers);
    if (moved < 0) die(1, "no descriptor is free from %d on: %s", numbers, strerror(errno));
    return close(fd), moved;
}

int main(int argc, char **argv) {
    static struct message m; char hello[128];
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    struct ucred peer; struct rlimit before;
    if (argc < 4 || strlen(argv[1]) >= sizeof name.sun_path) die(2, "fetch SOCKET TASK COMMAND...");
    strcpy(name.sun_path, argv[1]);
    int connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), count = 0, numbers = 3;
    if (connect(connection, (struct sockaddr *)&name, sizeof name) < 0 ||
        getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &(socklen_t){sizeof peer}) < 0)
        die(2, "%s: %s", argv[1], strerror(errno));
    if (peer.uid && peer.uid != geteuid()) die(2, "%s: user %u serves there", argv[1], peer.uid);
    getrlimit(RLIMIT_NOFILE, &before);
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){before.rlim_max, before.rlim_max});
    struct file *files = NULL;
    snprintf(hello, 128, "{\"type\": \"hello\", \"version\": 1, \"task\": %d}", atoi(argv[2]));
    say(connection, hello);
    do {
        hear(connection, &m, "files");
        if (!(files = realloc(files, (size_t)(count + FDS) * sizeof *files))) die(1, "no memory");
        memcpy(files + count, m.file, (size_t)m.count * sizeof *files);
        for (int end = count + m.count; count < end; count++)
            if (files[count].number >= numbers) numbers = files[count].number + 1;
    } while (m.more);
    people = above(dup(2), numbers), connection = above(connection, numbers);
    for (int i = 0; i < count; i++) files[i].fd = above(files[i].fd, numbers);
    char *cloexec = calloc((size_t)count + 1, sizeof "2147483647,"), *end = cloexec;
    char *keys = calloc((size_t)count + 1, sizeof files->key + 32), *last = keys;
    for (struct file *f = files; f < files + count; f++) {
        if (dup2(f->fd, f->number) < 0 || close(f->fd) < 0 || !cloexec || !keys)
            die(1, "number %d: %s", f->number, strerror(errno));
        if (f->cloexec) end += sprintf(end, &",%d"[end == cloexec], f->number);
        if (*f->key) last += sprintf(last, "%c\"%s\": %d", ",{"[last == keys], f->key, f->number);
    }
    strcpy(last, &"{}"[last > keys]), say(connection, "{\"type\": \"ready\"}");
    hear(connection, &m, "released"), setenv("GHOSTPOOL_TASK", argv[2], 1);
    setenv("GHOSTPOOL_CLOEXEC", cloexec, 1), setenv("GHOSTPOOL_KEYS", keys, 1);
    if ((rlim_t)numbers <= before.rlim_cur) setrlimit(RLIMIT_NOFILE, &before);
    execvp(argv[3], argv + 3);
    die(1, "%s: %s", argv[3], strerror(errno));
}
